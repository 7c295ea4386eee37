// The parts of a decoder's layer that are no products with packed matrices, for one token: norms, rotary positions,
// attention on a cache, SwiGLU; and products with float32 matrices. Compiled once for every instruction set, so it must
// not use anything from the C++ library (see cross_entropy_rows.cpp).
//
// Sums run in 16 lanes, whatever the register, which are joined at the end: every instruction set gives the same bits.

#include "decode_rows.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "formats.h"

constexpr int LANES = 16;
constexpr int PARTS = LANES / WIDTH;

inline float sum_of(Floats (&parts)[PARTS]) {
  return join_registers(parts, [](auto a, auto b) { return a + b; });
}

// Calls work(part, i, count) for registers that cover [0, count): `part` goes round the 16 lanes, `i` is where the
// register begins, and `count` how much of it exists.
template <typename Work>
inline void each_register(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int part = 0; part < PARTS; ++part) work(part, i + part * WIDTH, WIDTH);
  for (int part = 0; i < count; ++part, i += WIDTH) work(part, i, count - i < WIDTH ? count - i : WIDTH);
}

template <typename T>
inline Floats load(const T* from, int64_t count) {
  return count == WIDTH ? wide(from) : wide_part(from, count, 0.0f);
}

inline void store(Floats value, float* to, int64_t count) {
  if (count == WIDTH)
    write(value, to);
  else
    write_part(value, to, count);
}

inline float dot(const float* a, const float* b, int64_t count) {
  Floats parts[PARTS] = {};
  each_register(count, [&](int part, int64_t i, int64_t n) { parts[part] += load(a + i, n) * load(b + i, n); });
  return sum_of(parts);
}

// Products of ROWS rows that lie `columns` apart, so that one row's sum need not wait for its own last addition.
template <int ROWS>
inline void dots(const float* rows, const float* x, float* out, int64_t columns) {
  Floats parts[ROWS][PARTS] = {};
  each_register(columns, [&](int part, int64_t i, int64_t n) {
    const Floats here = load(x + i, n);
    for (int row = 0; row < ROWS; ++row) parts[row][part] += load(rows + row * columns + i, n) * here;
  });
  for (int row = 0; row < ROWS; ++row) out[row] = sum_of(parts[row]);
}

// Rotates the first dims: dim j with dim j + rotated / 2.
inline void rotate(float* x, const Turn& turn) {
  const int64_t half = turn.rotated / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float first = x[j], second = x[j + half];
    x[j] = first * turn.cosines[j] + second * turn.sines[j];
    x[j + half] = second * turn.cosines[j + half] + first * turn.sines[j + half];
  }
}

// exp(x - largest) in place; returns the sum.
inline float exponentials(float* scores, int64_t count) {
  Floats most[PARTS];
  for (Floats& part : most) part = all(-INFINITE);
  each_register(count, [&](int part, int64_t i, int64_t n) {
    const Floats here = n == WIDTH ? wide(scores + i) : wide_part(scores + i, n, -INFINITE);
    most[part] = maximum(most[part], here);
  });
  const float largest = join_registers(most, [](auto a, auto b) { return b > a ? b : a; });
  Floats sums[PARTS] = {};
  each_register(count, [&](int part, int64_t i, int64_t n) {
    const Floats here = n == WIDTH ? wide(scores + i) : wide_part(scores + i, n, -INFINITE);
    const Floats value = exp_nonpositive(here - largest);
    sums[part] += value;
    store(value, scores + i, n);
  });
  return sum_of(sums);
}

// The mean of values by their weights, for REGISTERS registers of dims from `at` on.
template <int REGISTERS>
inline void mix(const Attention& in, float total, float* out, int64_t at) {
  Floats sums[REGISTERS] = {};
  for (int64_t t = 0; t <= in.position; ++t) {
    const float* const value = in.values + t * in.width + at;
    for (int r = 0; r < REGISTERS; ++r) sums[r] += wide(value + r * WIDTH) * in.scores[t];
  }
  for (int r = 0; r < REGISTERS; ++r) write(sums[r] / total, out + at + r * WIDTH);
}

inline void mix_rest(const Attention& in, float total, float* out, int64_t at) {
  for (; at < in.width; ++at) {
    float sum = 0.0f;
    for (int64_t t = 0; t <= in.position; ++t) sum += in.values[t * in.width + at] * in.scores[t];
    out[at] = sum / total;
  }
}

inline void attend_head(const Attention& in, const float* query, float* out, float scale) {
  int64_t t = 0;
  for (; t + 4 <= in.position + 1; t += 4) dots<4>(in.keys + t * in.width, query, in.scores + t, in.width);
  for (; t <= in.position; ++t) in.scores[t] = dot(in.keys + t * in.width, query, in.width);
  for (t = 0; t <= in.position; ++t) in.scores[t] *= scale;
  const float total = exponentials(in.scores, in.position + 1);
  int64_t at = 0;
  for (; at + 4 * WIDTH <= in.width; at += 4 * WIDTH) mix<4>(in, total, out, at);
  for (; at + WIDTH <= in.width; at += WIDTH) mix<1>(in, total, out, at);
  mix_rest(in, total, out, at);
}

template <typename T>
inline void widen_row(const T* from, float* to, int64_t count) {
  each_register(count, [&](int, int64_t i, int64_t n) { store(load(from + i, n), to + i, n); });
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* out, int64_t count, float epsilon) {
  const float factor = 1.0f / __builtin_sqrtf(dot(x, x, count) / static_cast<float>(count) + epsilon);
  each_register(count, [&](int, int64_t i, int64_t n) {
    store(load(x + i, n) * factor * load(weight + i, n), out + i, n);
  });
}

void swiglu(const float* gate, const float* up, float* out, int64_t count) {
  each_register(count, [&](int, int64_t i, int64_t n) {
    const Floats x = load(gate + i, n), e = exp_nonpositive(x < 0.0f ? x : -x);
    const Floats sigmoid = (x < 0.0f ? e : all(1.0f)) / (e + 1.0f);
    store(x * sigmoid * load(up + i, n), out + i, n);
  });
}

void add(const float* x, float* to, int64_t count) {
  each_register(count, [&](int, int64_t i, int64_t n) { store(load(to + i, n) + load(x + i, n), to + i, n); });
}

void attend(const Attention& in, const Turn& turn) {
  float* const key = in.keys + in.position * in.width;
  __builtin_memcpy(key, in.key, in.width * sizeof(float));
  __builtin_memcpy(in.values + in.position * in.width, in.value, in.width * sizeof(float));
  if (turn.key_norm != nullptr) rms_norm(key, turn.key_norm, key, in.width, turn.epsilon);
  rotate(key, turn);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(in.width));
  for (int64_t head = 0; head < in.heads; ++head) {
    float* const query = in.queries + head * in.width;
    if (turn.query_norm != nullptr) rms_norm(query, turn.query_norm, query, in.width, turn.epsilon);
    rotate(query, turn);
    attend_head(in, query, in.out + head * in.width, scale);
  }
}

void widen(const float* from, float* to, int64_t count) { widen_row(from, to, count); }
void widen(const BFloat16* from, float* to, int64_t count) { widen_row(from, to, count); }
void widen(const Float16* from, float* to, int64_t count) { widen_row(from, to, count); }

void float_rows(const float* weight, const float* x, float* out, int64_t columns, int64_t from, int64_t to) {
  int64_t row = from;
  for (; row + 4 <= to; row += 4) dots<4>(weight + row * columns, x, out + row, columns);
  for (; row < to; ++row) dots<1>(weight + row * columns, x, out + row, columns);
}

}  // namespace MEGACPT_ISA
}  // namespace megacpt
