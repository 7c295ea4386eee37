// Rows of one number an expert, spread over a few lanes of a warp, and column sums over all rows of a launch.
#pragma once

#include "numbers.cuh"

namespace megacpt {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int MOST_EXPERTS = 1024, MOST_CHOSEN = 32;

// The definitions of megacpt/ops/router_reference.py.
constexpr float PROBABILITY_ONE = 1073741824.0f;  // 2^30
constexpr double Z_ONE = 1048576.0, Z_LARGEST = 4096.0;
constexpr float SMALL = 1e-20f, SMALLEST_NORMAL = 1.17549435e-38f;

__device__ __forceinline__ int fixed_probability(float p) { return to_nearest(p * PROBABILITY_ONE); }

__device__ __forceinline__ long long fixed_z(float lse) {
  const double size = lse < 0.0f ? -static_cast<double>(lse) : static_cast<double>(lse);
  const double z = size > Z_LARGEST ? Z_LARGEST : size;
  return to_nearest(z * z * Z_ONE);
}

// Integers in the order of the floats, all above TAKEN; -0 counts as 0.
constexpr int TAKEN = INT32_MIN;

__device__ __forceinline__ int ordered(float value) {
  const int bits = bits_as<int>(value + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float unordered(int key) { return bits_as<float>(key ^ ((key >> 31) & 0x7fffffff)); }

// A key of 16-bit logits that holds the place as well, the lower one larger: 13 bits of their float32 are always zero.
constexpr int PLACES = 0x1fff;
__device__ __forceinline__ int packed(float value, int place) { return (ordered(value) & ~PLACES) | (PLACES - place); }
__device__ __forceinline__ int place_of(int key) { return PLACES - (key & PLACES); }

template <int LANES, typename Value, typename Join>
__device__ __forceinline__ Value joined(Value value, const Join& join) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) value = join(value, __shfl_xor_sync(WARP, value, mask));
  return value;
}

template <int LANES, typename Value>
__device__ __forceinline__ Value total(Value value) {
  return joined<LANES>(value, [](Value a, Value b) { return a + b; });
}

template <int LANES, typename Value>
__device__ __forceinline__ Value largest(Value value) {
  return joined<LANES>(value, [](Value a, Value b) { return a < b ? b : a; });
}

template <int LANES, typename Value>
__device__ __forceinline__ Value smallest(Value value) {
  return joined<LANES>(value, [](Value a, Value b) { return b < a ? b : a; });
}

// The sum of what all threads of a block hold, to all of them; always in the same order. `shared` has room for WARPS.
template <typename Value>
__device__ __forceinline__ Value block_total(Value value, Value* shared) {
  value = total<32>(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  Value sum = shared[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) sum += shared[warp];
  return sum;
}

// A row of up to LANES * EACH experts of type T on LANES lanes of a warp, EACH numbers a lane. Neighbouring lanes hold
// neighbouring groups of VECTOR columns, so that aligned rows are read in 128-bit pieces.
template <typename T_, int LANES_, int EACH_>
struct Row {
  using T = T_;
  static constexpr int LANES = LANES_, EACH = EACH_, WIDTH = LANES * EACH;
  static constexpr int VECTOR = 16 / sizeof(T);
  static constexpr int ROWS = THREADS / LANES;          // of a block
  static constexpr int BLOCKS = EACH > 16 ? 2 : 4;      // at least, on a processor: a limit on registers
  static_assert(EACH % VECTOR == 0, "a lane holds whole vectors");

  __device__ static __forceinline__ int lane() { return threadIdx.x % LANES; }

  // The row of this block that the thread works on.
  __device__ static __forceinline__ int slot() { return threadIdx.x / LANES; }

  // The column of a lane's number j: (j / VECTOR * LANES + lane) * VECTOR + j % VECTOR.
  __device__ static __forceinline__ int column(int j) {
    return lane() * VECTOR + (j / VECTOR * LANES * VECTOR + j % VECTOR);
  }

  // Reads a row; columns beyond `count` become -infinity.
  __device__ static __forceinline__ void load(const T* from, int count, bool aligned, float (&x)[EACH]) {
    if (aligned) {
#pragma unroll
      for (int j = 0; j < EACH; j += VECTOR) {
        constexpr uint32_t OUTSIDE = minus_infinity(T{});
        uint4 piece{OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE};
        if (column(j) < count) piece = *reinterpret_cast<const uint4*>(from + column(j));
        T values[VECTOR];
        memcpy(values, &piece, sizeof piece);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x[j + i] = widened(values[i]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < EACH; ++j) x[j] = column(j) < count ? widened(from[column(j)]) : -INFINITE;
    }
  }

  __device__ static __forceinline__ void store(const float (&x)[EACH], int count, bool aligned, T* to) {
    T values[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) narrow(x[j], values[j]);
    if (aligned) {
#pragma unroll
      for (int j = 0; j < EACH; j += VECTOR) {
        uint4 piece;
        memcpy(&piece, &values[j], sizeof piece);
        if (column(j) < count) *reinterpret_cast<uint4*>(to + column(j)) = piece;
      }
    } else {
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        if (column(j) < count) to[column(j)] = values[j];
    }
  }

  // Adds what all threads of the block hold for their columns to `sums` in global memory, in any order: they are
  // integers. `shared` has room for WARPS * WIDTH of them.
  __device__ static __forceinline__ void add_columns(long long (&mine)[EACH], unsigned long long* shared, int count,
                                                     unsigned long long* sums) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
#pragma unroll
      for (int mask = LANES; mask < 32; mask *= 2) mine[j] += __shfl_xor_sync(WARP, mine[j], mask);
      if (threadIdx.x % 32 < LANES) shared[threadIdx.x / 32 * WIDTH + column(j)] = mine[j];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < count; e += THREADS) {
      unsigned long long sum = 0;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp * WIDTH + e];
      if (sum != 0) atomicAdd(&sums[e], sum);
    }
    __syncthreads();
  }
};

template <typename T>
bool aligned_rows(const void* rows, int64_t width) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && width * sizeof(T) % 16 == 0;
}

// The softmax of a row. Returns whether the row has a meaning: a NaN, +inf
// or nothing but -inf make its sum NaN. `lse` is its log-sum-exp.
template <typename Row>
__device__ __forceinline__ bool softmax(const float (&x)[Row::EACH], float (&p)[Row::EACH], float& lse) {
  float top = -INFINITE, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) top = fmaxf(top, x[j]);
  top = largest<Row::LANES>(top);
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) {
    p[j] = exp_fast(x[j] - top);
    sum += p[j];
  }
  sum = total<Row::LANES>(sum);
  lse = top + logf(sum);
  const float share = reciprocal_fast(sum);
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) p[j] *= share;
  return sum == sum;
}

// Global memory in which a launch gathers its sums. It is zero before and after every launch: the block that is done
// last moves the sums out.
struct Workspace {
  unsigned long long* ticket;  // [1]
  unsigned long long* sums;    // [count]
};

// Calls out(i, sum) for each of `count` sums, in the last block.
template <typename Out>
__device__ __forceinline__ void move_out(const Workspace& work, int count, bool* last, const Out& out) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(work.ticket, 1ull) == gridDim.x - 1;
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int i = threadIdx.x; i < count; i += THREADS) {
    out(i, static_cast<long long>(__ldcg(&work.sums[i])));
    work.sums[i] = 0;
  }
  if (threadIdx.x == 0) *work.ticket = 0;
}

constexpr int64_t WORKSPACE = 2 + 2 * MOST_EXPERTS;  // numbers of 64 bits that suffice for every launch

// Calls run(Row{}) with the smallest rows that `experts` columns of type T fit in; returns -1 if none does.
template <typename T, typename Run>
int on_rows(int experts, const Run& run) {
  if (experts <= 8) return run(Row<T, 1, 8>{});
  if (experts <= 32) return run(Row<T, 2, 16>{});
  if (experts <= 64) return run(Row<T, 4, 16>{});
  if (experts <= 128) return run(Row<T, 8, 16>{});
  if (experts <= 256) return run(Row<T, 16, 16>{});
  if (experts <= 512) return run(Row<T, 32, 16>{});
  if (experts <= MOST_EXPERTS) return run(Row<T, 32, 32>{});
  return -1;
}

enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <typename Run>
int on_rows(int format, int experts, const Run& run) {
  if (format == FLOAT32) return on_rows<float>(experts, run);
  if (format == BFLOAT16) return on_rows<BFloat16>(experts, run);
  if (format == FLOAT16) return on_rows<Float16>(experts, run);
  return -1;
}

}  // namespace megacpt
