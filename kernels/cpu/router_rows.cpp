// The router for single tokens: scores, the exact k best, gates, and the sums that balance losses are made of, in one
// pass over a row of logits that stays in the L1 cache; and the gradient of all three in another, which computes the
// scores again. What each number means is said in megacpt/ops/router_reference.py. Compiled once for every instruction
// set, so it must not use anything from the C++ library (see cross_entropy_rows.cpp).

#include "router_rows.h"

extern "C" float logf(float) noexcept;

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "expert_rows.h"

constexpr float PROBABILITY_ONE = 1073741824.0f;  // 2^30
constexpr double Z_ONE = 1048576.0, Z_LARGEST = 4096.0;
constexpr int32_t TAKEN = INT32_MIN;  // below the key of every number, -inf included
constexpr float SMALL = 1e-20f;

// Integers in the order of the floats: comparing them is exact, and leaves room below -inf. -0 counts as 0.
inline Ints ordered(Floats value) {
  const Ints bits = (Ints)(value + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline void put_keys(int32_t* keys, int64_t i, Ints value) { __builtin_memcpy(keys + i, &value, sizeof value); }

// Takes keys out of a row, the largest first, and of equal ones that with the lowest index. A row is cut into LANES
// columns; each remembers its best, so that only the column of a key that was taken is looked at again.
class Best {
 public:
  Best(int32_t* keys, int64_t count) : keys(keys), count(padded(count)) {
    constexpr int32_t INDICES[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int part = 0; part < PARTS; ++part) {
      Ints best = Ints{} + TAKEN, place = Ints{}, here = read<Ints>(INDICES + part * WIDTH);
      for (int64_t i = part * WIDTH; i < this->count; i += LANES) {
        const Ints key = read<Ints>(keys + i);
        const Ints better = key > best;  // strict: an equal key further on does not replace
        best = better ? key : best;
        place = better ? here : place;
        here += LANES;
      }
      for (int lane = 0; lane < WIDTH; ++lane) columns[part * WIDTH + lane] = joined(best[lane], place[lane]);
    }
  }

  int64_t take() {
    alignas(64) int64_t best[LANES / 2];
    for (int lane = 0; lane < LANES / 2; ++lane) best[lane] = larger(columns[lane], columns[lane + LANES / 2]);
    for (int half = LANES / 4; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) best[lane] = larger(best[lane], best[lane + half]);
    const int64_t index = INT32_MAX - (best[0] & 0xffffffff);
    keys[index] = TAKEN;
    int64_t column = joined(TAKEN, 0);
    for (int64_t i = index % LANES; i < count; i += LANES)
      column = larger(column, joined(keys[i], static_cast<int32_t>(i)));
    columns[index % LANES] = column;
    return index;
  }

 private:
  // Key before index in one number: the largest has the largest key, and of equal ones the lowest index.
  static int64_t joined(int32_t key, int32_t index) {
    return static_cast<int64_t>(key) * (int64_t{1} << 32) + (INT32_MAX - index);
  }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  int32_t* keys;
  int64_t count;
  alignas(64) int64_t columns[LANES];
};

inline float value_of(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Takes all keys of the groups that are not kept: those with the smaller sums of their best keys.
inline void drop_groups(int32_t* keys, const Scoring& scoring) {
  const int64_t size = scoring.experts / scoring.groups, each_group = scoring.chosen / scoring.groups_kept;
  alignas(64) int32_t strength[MOST_EXPERTS], members[MOST_EXPERTS];
  for (int64_t i = 0; i < padded(scoring.groups); ++i) strength[i] = TAKEN;
  for (int64_t group = 0; group < scoring.groups; ++group) {
    for (int64_t i = 0; i < padded(size); ++i) members[i] = i < size ? keys[group * size + i] : TAKEN;
    float sum = 0.0f;
    Best best(members, size);
    for (int64_t n = 0; n < each_group; ++n) sum += value_of(keys[group * size + best.take()]);
    strength[group] = ordered(all(sum))[0];
  }
  uint8_t kept[MOST_EXPERTS] = {};
  Best best(strength, scoring.groups);
  for (int64_t n = 0; n < scoring.groups_kept; ++n) kept[best.take()] = 1;
  for (int64_t i = 0; i < scoring.experts; ++i)
    if (!kept[i / size]) keys[i] = TAKEN;
}

// A token without a meaning: to the first experts, or to none.
inline void leave(const Routes& routes, const Scoring& scoring, int64_t token, bool masked) {
  for (int64_t n = 0; n < scoring.chosen; ++n) {
    routes.experts[token * scoring.chosen + n] = masked ? -1 : static_cast<int32_t>(n);
    routes.gates[token * scoring.chosen + n] = masked ? 0.0f : __builtin_nanf("");
  }
  routes.lse[token] = masked ? 0.0f : __builtin_nanf("");
}

// Whether a row holds NaN or +inf, or nothing but -inf.
inline bool broken(const float* x, int64_t count, float top) {
  Ints bad[PARTS] = {};
  for (int64_t i = 0; i < padded(count); i += LANES)
    for (int part = 0; part < PARTS; ++part) {
      const Floats value = at(x, i + part * WIDTH);
      bad[part] |= value != value;
    }
  int32_t any = 0;
  for (int part = 0; part < PARTS; ++part)
    for (int lane = 0; lane < WIDTH; ++lane) any |= bad[part][lane];
  return any != 0 || top == INFINITE || top == -INFINITE;
}

// The softmax over the chosen logits: their scores over the sum of these, which a bias may have made too small to divide
// by, so that it has to be computed from the logits.
inline void softmax_of(const float* x, const float* score, const int32_t* experts, int64_t count, float* gates) {
  float share = 0.0f;
  for (int64_t n = 0; n < count; ++n) {
    gates[n] = score[experts[n]];
    share += gates[n];
  }
  if (share > SMALL) {
    for (int64_t n = 0; n < count; ++n) gates[n] /= share;
    return;
  }
  alignas(64) float chosen[MOST_CHOSEN];
  for (int64_t n = 0; n < padded(count); ++n) chosen[n] = n < count ? x[experts[n]] : -INFINITE;
  alignas(64) float shifted[MOST_CHOSEN];
  const float top = largest(chosen, count);
  each(count, [&](int64_t i) { put(shifted, i, exp_nonpositive(at(chosen, i) - top)); });
  const float sum = sum_over(count, [&](int64_t i) { return at(shifted, i); });
  for (int64_t n = 0; n < count; ++n) gates[n] = shifted[n] / sum;
}

struct Scores {
  alignas(64) float score[MOST_EXPERTS];  // softmax, or sigmoids
  float total, lse;                       // their sum (1 for softmax); log-sum-exp of the logits
};

inline void make_scores(const float* x, float top, const Scoring& scoring, Scores& out) {
  const int64_t count = scoring.experts;
  const float sum = sum_over(count, [&](int64_t i) {
    const Floats term = exp_nonpositive(at(x, i) - top);
    put(out.score, i, term);
    return term;
  });
  out.lse = top + logf(sum);
  out.total = 1.0f;
  if (!scoring.sigmoid) {
    each(count, [&](int64_t i) { put(out.score, i, at(out.score, i) / sum); });
    return;
  }
  out.total = sum_over(count, [&](int64_t i) {  // the padding is -inf: its sigmoid is 0
    const Floats term = sigmoid(at(x, i));
    put(out.score, i, term);
    return term;
  });
}

inline void make_keys(const float* x, const float* bias, const float* score, const Scoring& scoring, int32_t* keys) {
  const bool of_logits = scoring.bias_on_logits || (bias == nullptr && scoring.groups == 1);
  const float* from = of_logits ? x : score;
  each(scoring.experts, [&](int64_t i) {
    const Floats key = bias == nullptr ? at(from, i) : at(from, i) + at(bias, i);
    put_keys(keys, i, ordered(key));
  });
  for (int64_t i = scoring.experts; i < padded(scoring.experts); ++i) keys[i] = TAKEN;
  if (scoring.groups > 1) drop_groups(keys, scoring);
}

inline void set_gates(const float* x, const Scores& scores, const Scoring& scoring, const int32_t* experts, float* gates) {
  float sum = SMALL;
  for (int64_t n = 0; n < scoring.chosen; ++n) {
    gates[n] = scores.score[experts[n]];
    sum += gates[n];
  }
  if (scoring.renormalise && !scoring.sigmoid)
    softmax_of(x, scores.score, experts, scoring.chosen, gates);
  else if (scoring.renormalise && scoring.chosen > 1)
    for (int64_t n = 0; n < scoring.chosen; ++n) gates[n] /= sum;
  for (int64_t n = 0; n < scoring.chosen; ++n) gates[n] *= scoring.scale;
}

inline void add_sums(const Scores& scores, const Scoring& scoring, const Sums& sums) {
  const float scale = PROBABILITY_ONE / scores.total;
  each(scoring.experts, [&](int64_t i) {
    const Longs fixed = __builtin_convertvector(__builtin_convertvector(at(scores.score, i) * scale + 0.5f, Ints), Longs);
    const Longs sum = read<Longs>(sums.probabilities + i) + fixed;
    __builtin_memcpy(sums.probabilities + i, &sum, sizeof sum);
  });
  double z = scores.lse < 0.0f ? -scores.lse : scores.lse;
  z = z > Z_LARGEST ? Z_LARGEST : z;
  *sums.z += static_cast<int64_t>(z * z * Z_ONE + 0.5);
}

template <typename T>
inline void route(const T* logits, const RouterIn& in, const Scoring& scoring, const Routes& routes, const Sums& sums,
                  int64_t token) {
  if (in.mask != nullptr && !in.mask[token]) return leave(routes, scoring, token, true);
  alignas(64) float x[MOST_EXPERTS];
  alignas(64) int32_t keys[MOST_EXPERTS];
  Scores scores;
  load_row(logits + token * scoring.experts, scoring.experts, x, -INFINITE);
  const float top = largest(x, scoring.experts);
  int32_t* experts = routes.experts + token * scoring.chosen;
  if (broken(x, scoring.experts, top)) {
    leave(routes, scoring, token, false);
  } else {
    make_scores(x, top, scoring, scores);
    make_keys(x, in.bias, scores.score, scoring, keys);
    Best best(keys, scoring.experts);
    for (int64_t n = 0; n < scoring.chosen; ++n) experts[n] = static_cast<int32_t>(best.take());
    set_gates(x, scores, scoring, experts, routes.gates + token * scoring.chosen);
    routes.lse[token] = scores.lse;
    add_sums(scores, scoring, sums);
  }
  for (int64_t n = 0; n < scoring.chosen; ++n) ++sums.counts[experts[n]];
}

// What the gates add to the gradient by the chosen logits; `grad` holds their gradient, scaled, and is overwritten.
inline void gates_gradient(const float* x, const Scores& scores, const Scoring& scoring, const int32_t* experts,
                           float* grad) {
  alignas(64) float gate[MOST_CHOSEN];
  float dot = 0.0f, sum = SMALL;
  if (scoring.renormalise && !scoring.sigmoid) {
    softmax_of(x, scores.score, experts, scoring.chosen, gate);
    for (int64_t n = 0; n < scoring.chosen; ++n) dot += grad[n] * gate[n];
    for (int64_t n = 0; n < scoring.chosen; ++n) grad[n] = gate[n] * (grad[n] - dot);
    return;
  }
  for (int64_t n = 0; n < scoring.chosen; ++n) {
    gate[n] = scores.score[experts[n]];
    dot += grad[n] * gate[n];
    sum += gate[n];
  }
  const bool share = scoring.sigmoid && scoring.renormalise && scoring.chosen > 1;
  for (int64_t n = 0; n < scoring.chosen; ++n) {
    if (share) grad[n] = (grad[n] - dot / sum) / sum;
    grad[n] *= scoring.sigmoid ? gate[n] * (1.0f - gate[n]) : gate[n];
  }
}

template <typename T>
inline void route_gradient(const T* logits, T* grad, const RouterGradient& up, const Scoring& scoring, int64_t token) {
  const int64_t count = scoring.experts, first = token * scoring.chosen;
  alignas(64) float x[MOST_EXPERTS], result[MOST_EXPERTS], chosen[MOST_CHOSEN];
  const float lse = up.lse[token];
  T* out = grad + token * count;
  if (up.experts[first] < 0 || lse != lse) {
    for (int64_t i = 0; i < count; ++i) result[i] = up.experts[first] < 0 ? 0.0f : __builtin_nanf("");
    return store_row(result, count, out);
  }
  Scores scores;
  load_row(logits + token * count, count, x, -INFINITE);
  each(count, [&](int64_t i) { put(result, i, exp_nonpositive(at(x, i) - lse)); });  // the softmax
  if (scoring.sigmoid)
    scores.total = sum_over(count, [&](int64_t i) {
      const Floats term = sigmoid(at(x, i));
      put(scores.score, i, term);
      return term;
    });
  else
    __builtin_memcpy(scores.score, result, padded(count) * sizeof(float));
  for (int64_t n = 0; n < scoring.chosen; ++n) chosen[n] = up.gates[first + n] * scoring.scale;
  const float balance = sum_over(count, [&](int64_t i) { return at(up.balance, i) * at(scores.score, i); });
  const float z = 2.0f * up.z * lse;
  if (scoring.sigmoid) {
    const float mean = balance / scores.total, part = 1.0f / scores.total;
    each(count, [&](int64_t i) {
      const Floats s = at(scores.score, i);
      put(result, i, (at(up.balance, i) - mean) * part * s * (1.0f - s) + z * at(result, i));
    });
  } else {
    float pull = z - balance;
    if (!scoring.renormalise)
      for (int64_t n = 0; n < scoring.chosen; ++n) pull -= chosen[n] * scores.score[up.experts[first + n]];
    each(count, [&](int64_t i) { put(result, i, at(result, i) * (at(up.balance, i) + pull)); });
  }
  gates_gradient(x, scores, scoring, up.experts + first, chosen);
  for (int64_t n = 0; n < scoring.chosen; ++n) result[up.experts[first + n]] += chosen[n];
  store_row(result, count, out);
}

}  // namespace

#define MEGACPT_ROUTER_ROWS(T)                                                                                          \
  void route_rows(const T* logits, const RouterIn& in, const Scoring& scoring, const Routes& routes, const Sums& sums,  \
                  int64_t from, int64_t to) {                                                                           \
    for (int64_t token = from; token < to; ++token) route(logits, in, scoring, routes, sums, token);                    \
  }                                                                                                                     \
  void route_gradient_rows(const T* logits, T* grad, const RouterGradient& upstream, const Scoring& scoring,            \
                           int64_t from, int64_t to) {                                                                  \
    for (int64_t token = from; token < to; ++token) route_gradient(logits, grad, upstream, scoring, token);             \
  }

MEGACPT_ROUTER_ROWS(float)
MEGACPT_ROUTER_ROWS(BFloat16)
MEGACPT_ROUTER_ROWS(Float16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
