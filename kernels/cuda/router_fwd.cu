// The router's forward pass: scores, the exact k best, gates, and the sums that balance losses are made of, in one launch
// that reads each logit once. megacpt/ops/router_reference.py says what each number means.
//
// A token's row lies in the registers of a few lanes. The k best are taken one by one: each lane finds its largest key,
// lanes compare theirs by shuffles, and the winner is struck out. Column sums stay in registers as integers until a block
// is done, so that neither the order of tokens nor that of blocks changes a bit.

#include "router.cuh"

namespace megacpt {
namespace {

struct RouteIn {
  const float* bias;    // [experts] or null
  const uint8_t* mask;  // [tokens], 0 for padding, or null
};

struct RouteOut {
  float* gates;                         // [tokens, chosen]
  int32_t* experts;                     // [tokens, chosen]
  float* lse;                           // [tokens]
  long long *counts, *prob_sum, *z_sum;  // [experts], [experts], [1]
};

// Keys that hold their place (16-bit logits alone), keys without, and those that groups are ranked by.
enum Keys { PACKED, PLAIN, GROUPED };

// A block's shared memory, in bytes from its start; the column sums come last, over all of it but the counts.
struct Layout {
  int chosen, logits, keys, strengths, end;
};

template <typename Row>
__host__ __device__ inline Layout layout(const Scoring& scoring, bool grouped) {
  Layout at{};
  at.chosen = (scoring.experts * 4 + 15) / 16 * 16;
  at.logits = at.chosen + Row::ROWS * scoring.chosen * 4;
  at.keys = at.logits + Row::ROWS * scoring.chosen * 4;
  at.strengths = at.keys + (grouped ? Row::ROWS * Row::WIDTH * 4 : 0);
  at.end = at.strengths + (grouped ? Row::ROWS * scoring.groups * 4 : 0);
  const int sums = at.chosen + WARPS * Row::WIDTH * 8;
  at.end = at.end > sums ? at.end : sums;
  return at;
}

// Strikes out the keys of all groups but those with the largest sums of their best keys. A lane ranks some groups.
template <typename Row>
__device__ __forceinline__ void drop_groups(int (&key)[Row::EACH], const Scoring& scoring, int* keys, int* strength) {
  const int size = scoring.experts / scoring.groups, best_of_each = scoring.chosen / scoring.groups_kept;
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) keys[Row::column(j)] = key[j];
  __syncwarp();
  for (int group = Row::lane(); group < scoring.groups; group += Row::LANES) {
    float sum = 0.0f;
    for (int n = 0; n < best_of_each; ++n) {
      int best = group * size;
      for (int e = best + 1; e < (group + 1) * size; ++e)
        if (keys[e] > keys[best]) best = e;
      sum += unordered(keys[best]);
      keys[best] = TAKEN;
    }
    strength[group] = ordered(sum);
  }
  __syncwarp();
  for (int group = Row::lane(); group < scoring.groups; group += Row::LANES) {
    int ahead = 0;
    for (int other = 0; other < scoring.groups; ++other)
      ahead += strength[other] > strength[group] || (strength[other] == strength[group] && other < group);
    keys[group] = ahead < scoring.groups_kept;  // the keys themselves are no longer needed
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j)
    if (Row::column(j) < scoring.experts && !keys[Row::column(j) / size]) key[j] = TAKEN;
  __syncwarp();
}

// Takes the largest key out of the row, the one of the lowest place among equal ones; returns its place, to all lanes.
template <typename Row, Keys KEYS>
__device__ __forceinline__ int take_best(int (&key)[Row::EACH]) {
  int best = TAKEN;
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) best = key[j] > best ? key[j] : best;
  best = largest<Row::LANES>(best);
  if constexpr (KEYS == PACKED) {
#pragma unroll
    for (int j = 0; j < Row::EACH; ++j) key[j] = key[j] == best ? TAKEN : key[j];
    return place_of(best);
  }
  int place = INT32_MAX;
#pragma unroll
  for (int j = Row::EACH - 1; j >= 0; --j) place = key[j] == best ? Row::column(j) : place;
  place = smallest<Row::LANES>(place);
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) key[j] = Row::column(j) == place ? TAKEN : key[j];
  return place;
}

// The keys that experts are chosen by: logits or scores, with the bias.
template <typename Row, Keys KEYS>
__device__ __forceinline__ void make_keys(const float (&x)[Row::EACH], const float (&p)[Row::EACH], const float* bias,
                                          const Scoring& scoring, int (&key)[Row::EACH]) {
  const bool of_logits = scoring.bias_on_logits || bias == nullptr;
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) {
    const int place = Row::column(j);
    const bool inside = place < scoring.experts;
    if constexpr (KEYS == PACKED) {
      key[j] = inside ? packed(x[j], place) : TAKEN;
    } else {
      const float value = KEYS != GROUPED && of_logits ? x[j] : scoring.sigmoid ? sigmoid(x[j]) : p[j];
      key[j] = inside ? ordered(bias == nullptr ? value : value + bias[place]) : TAKEN;
    }
  }
}

template <typename Row>
__device__ __forceinline__ void add_probabilities(const float (&x)[Row::EACH], const float (&p)[Row::EACH], bool sigmoids,
                                                  bool valid, long long (&sums)[Row::EACH]) {
  float all = 0.0f;
  if (sigmoids) {
#pragma unroll
    for (int j = 0; j < Row::EACH; ++j) all += sigmoid(x[j]);
    all = reciprocal_fast(fmaxf(total<Row::LANES>(all), SMALLEST_NORMAL));
  }
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) {
    const int fixed = fixed_probability(sigmoids ? sigmoid(x[j]) * all : p[j]);
    sums[j] += valid ? fixed : 0;
  }
}

template <typename Row, Keys KEYS>
__global__ void __launch_bounds__(THREADS, Row::BLOCKS)
    route(const typename Row::T* logits, bool aligned, RouteIn in, Scoring scoring, RouteOut out, Workspace work,
          int64_t tokens) {
  MEGACPT_SHARED(shared);
  const Layout at = layout<Row>(scoring, KEYS == GROUPED);
  const int lane = Row::lane(), slot = Row::slot(), k = scoring.chosen, count = scoring.experts;
  int* counts = reinterpret_cast<int*>(shared);
  int* chosen = reinterpret_cast<int*>(shared + at.chosen) + slot * k;
  float* weight = reinterpret_cast<float*>(shared + at.logits) + slot * k;
  for (int e = threadIdx.x; e < count; e += THREADS) counts[e] = 0;
  __syncthreads();
  long long sums[Row::EACH] = {}, z = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * Row::ROWS; first < tokens;
       first += static_cast<int64_t>(gridDim.x) * Row::ROWS) {
    const int64_t token = first + slot;
    const bool there = token < tokens, masked = there && in.mask != nullptr && !in.mask[token];
    const typename Row::T* row = logits + (there ? token : 0) * count;
    float x[Row::EACH], p[Row::EACH], lse;
    int key[Row::EACH];
    Row::load(row, count, aligned, x);
    const bool whole = softmax<Row>(x, p, lse), valid = there && !masked && whole;
    make_keys<Row, KEYS>(x, p, in.bias, scoring, key);
    add_probabilities<Row>(x, p, scoring.sigmoid, valid, sums);
    if (valid && lane == 0) z += fixed_z(lse);
    if constexpr (KEYS == GROUPED)
      drop_groups<Row>(key, scoring, reinterpret_cast<int*>(shared + at.keys) + slot * Row::WIDTH,
                       reinterpret_cast<int*>(shared + at.strengths) + slot * scoring.groups);
#pragma unroll 1
    for (int n = 0; n < k; ++n) {
      const int place = take_best<Row, KEYS>(key);
      if (n % Row::LANES == lane) {
        chosen[n] = whole ? place : n;
        weight[n] = widened(row[whole ? place : n]);
      }
    }
    const float share = reciprocal_fast(chosen_weights<Row::LANES>(scoring, lse, lane, weight)), nan = bits_as<float>(0x7fffffff);
    if (!there) continue;
    for (int n = lane; n < k; n += Row::LANES) {
      out.gates[token * k + n] = masked ? 0.0f : whole ? weight[n] * share * scoring.scale : nan;
      out.experts[token * k + n] = masked ? -1 : chosen[n];
      if (!masked) atomicAdd(&counts[chosen[n]], 1);
    }
    if (lane == 0) out.lse[token] = masked ? 0.0f : whole ? lse : nan;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < count; e += THREADS)
    if (counts[e] != 0) atomicAdd(&work.sums[count + e], static_cast<unsigned long long>(counts[e]));
  Row::add_columns(sums, reinterpret_cast<unsigned long long*>(shared + at.chosen), count, work.sums);
  z = total<32>(z);
  if (threadIdx.x % 32 == 0 && z != 0) atomicAdd(&work.sums[2 * count], static_cast<unsigned long long>(z));
  move_out(work, 2 * count + 1, reinterpret_cast<bool*>(shared), [&](int i, long long sum) {
    (i < count ? out.prob_sum[i] : i < 2 * count ? out.counts[i - count] : out.z_sum[0]) = sum;
  });
}

template <typename Row, Keys KEYS>
int run(const void* logits, const RouteIn& in, const Scoring& scoring, const RouteOut& out, const Workspace& work,
        int64_t tokens, cudaStream_t stream) {
  using T = typename Row::T;
  const size_t shared = layout<Row>(scoring, KEYS == GROUPED).end;
  const int64_t wanted = (tokens + Row::ROWS - 1) / Row::ROWS, most = resident_blocks(route<Row, KEYS>, THREADS, shared);
  if (most == 0) return -2;
  const int blocks = static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
  return launch(route<Row, KEYS>, blocks, THREADS, shared, stream, false, static_cast<const T*>(logits),
                aligned_rows<T>(logits, scoring.experts), in, scoring, out, work, tokens);
}

}  // namespace
}  // namespace megacpt

MEGACPT_EXPORT int megacpt_cuda_router_limit(int chosen) {
  return chosen ? megacpt::MOST_CHOSEN : megacpt::MOST_EXPERTS;
}

MEGACPT_EXPORT int64_t megacpt_cuda_workspace() { return megacpt::WORKSPACE; }

// `work`: megacpt_cuda_workspace() numbers of 64 bits, zero before the first launch; for one stream alone.
MEGACPT_EXPORT int megacpt_cuda_route(const void* logits, int format, const float* bias, const uint8_t* mask, float* gates,
                                      int32_t* experts, float* lse, long long* counts, long long* prob_sum,
                                      long long* z_sum, unsigned long long* work, int64_t tokens, int width, int chosen,
                                      int sigmoid, int renormalise, int bias_on_logits, int groups, int groups_kept,
                                      float scale, cudaStream_t stream) {
  using namespace megacpt;
  if (chosen > MOST_CHOSEN) return -1;
  const Scoring scoring{width, chosen, sigmoid != 0, renormalise != 0, bias_on_logits != 0, groups, groups_kept, scale};
  const RouteIn in{bias, mask};
  const RouteOut out{gates, experts, lse, counts, prob_sum, z_sum};
  const Workspace workspace{work, work + 1};
  return on_rows(format, width, [&](auto row) {
    using Row = decltype(row);
    if (groups > 1) return run<Row, GROUPED>(logits, in, scoring, out, workspace, tokens, stream);
    if constexpr (sizeof(typename Row::T) == 2)
      if (bias == nullptr) return run<Row, PACKED>(logits, in, scoring, out, workspace, tokens, stream);
    return run<Row, PLAIN>(logits, in, scoring, out, workspace, tokens, stream);
  });
}
