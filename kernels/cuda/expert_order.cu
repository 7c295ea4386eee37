// Tokens into the order of their experts and back: a stable counting sort, the copy of rows that follows it, and the
// weighted sum that undoes it. Every number is written by one thread in a fixed order: no atomics on results.

#include <initializer_list>
#include <type_traits>

#include "rows.cuh"

namespace megacpt {
namespace {

// The sort's work is cut into tiles of consecutive slots, a warp each. Slots without an expert come last.
struct Tiles {
  int64_t slots;
  int size, count, buckets;  // slots of a tile, a multiple of 32; tiles; experts and one
};

__device__ __forceinline__ int bucket_of(const int32_t* experts, int64_t slot, const Tiles& tiles) {
  if (slot >= tiles.slots) return -1;
  const int expert = experts[slot];
  return expert < 0 || expert >= tiles.buckets - 1 ? tiles.buckets - 1 : expert;
}

// How many slots of each tile each bucket gets: table [buckets, tiles].
__global__ void __launch_bounds__(THREADS) count_tiles(const int32_t* experts, Tiles tiles, int* table) {
  MEGACPT_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x * WARPS + warp;
  int* counts = reinterpret_cast<int*>(shared) + warp * tiles.buckets;
  for (int b = lane; b < tiles.buckets; b += 32) counts[b] = 0;
  __syncwarp();
  const int64_t first = static_cast<int64_t>(tile) * tiles.size;
  for (int i = lane; i < tiles.size; i += 32) {
    const int bucket = bucket_of(experts, first + i, tiles);
    if (bucket >= 0) atomicAdd(&counts[bucket], 1);
  }
  __syncwarp();
  if (tile < tiles.count)
    for (int b = lane; b < tiles.buckets; b += 32) table[static_cast<int64_t>(b) * tiles.count + tile] = counts[b];
}

// The sum over the lanes before this one; `all` becomes the sum over all of them.
__device__ __forceinline__ int exclusive_sum(int value, int& all) {
  const int lane = threadIdx.x % 32;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(WARP, sum, distance);
    if (lane >= distance) sum += before;
  }
  all = __shfl_sync(WARP, sum, 31);
  return sum - value;
}

// The counts of a row of the table become the sums of those before them; a warp a bucket. `totals` [buckets].
__global__ void __launch_bounds__(THREADS) scan_tiles(Tiles tiles, int* table, int* totals) {
  const int bucket = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (bucket >= tiles.buckets) return;
  int* row = table + static_cast<int64_t>(bucket) * tiles.count;
  int before = 0;
  for (int start = 0; start < tiles.count; start += 32) {
    const int at = start + lane;
    int all = 0;
    const int sum = exclusive_sum(at < tiles.count ? row[at] : 0, all);
    if (at < tiles.count) row[at] = before + sum;
    before += all;
  }
  if (lane == 0) totals[bucket] = before;
}

__global__ void __launch_bounds__(THREADS) place_slots(const int32_t* experts, Tiles tiles, const int* table,
                                                       const int* totals, int32_t* perm, int32_t* inverse,
                                                       int64_t* counts) {
  MEGACPT_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x * WARPS + warp;
  int* next = reinterpret_cast<int*>(shared) + warp * tiles.buckets;  // where a bucket's next slot goes
  int before = 0;
  for (int start = 0; start < tiles.buckets; start += 32) {
    const int b = start + lane;
    int all = 0;
    const int mine = b < tiles.buckets ? totals[b] : 0, offset = before + exclusive_sum(mine, all);
    before += all;
    if (b >= tiles.buckets) continue;
    if (tile == 0 && b < tiles.buckets - 1) counts[b] = mine;
    next[b] = offset + (tile < tiles.count ? table[static_cast<int64_t>(b) * tiles.count + tile] : 0);
  }
  __syncwarp();
  const int64_t first = static_cast<int64_t>(tile) * tiles.size;
  for (int i = lane; i < tiles.size; i += 32) {
    const int bucket = bucket_of(experts, first + i, tiles);
    const unsigned same = __match_any_sync(WARP, bucket), lower = (1u << lane) - 1u;
    const int rank = __popc(same & lower);
    const int place = bucket < 0 ? 0 : next[bucket] + rank;
    __syncwarp();
    if (bucket >= 0 && rank == 0) next[bucket] += __popc(same);
    __syncwarp();
    if (bucket < 0) continue;
    perm[place] = static_cast<int32_t>(first + i);
    inverse[first + i] = bucket == tiles.buckets - 1 ? -1 : place;
  }
}

template <typename T>
constexpr int VECTOR = 16 / sizeof(T);

// Reads up to 128 bits of a row; a scalar row gives one number at a time.
template <typename T, int N>
__device__ __forceinline__ void load_piece(const T* from, float (&x)[N]) {
  T values[N];
  if constexpr (N == 1) {
    values[0] = *from;
  } else {
    const uint4 piece = *reinterpret_cast<const uint4*>(from);
    memcpy(values, &piece, sizeof piece);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = widened(values[i]);
}

template <typename T, int N>
__device__ __forceinline__ void store_piece(const float (&x)[N], T* to) {
  T values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(x[i], values[i]);
  if constexpr (N == 1) {
    *to = values[0];
  } else {
    uint4 piece;
    memcpy(&piece, values, sizeof piece);
    *reinterpret_cast<uint4*>(to) = piece;
  }
}

// out[i] = x[perm[i] / chosen], 0 for a slot without an expert; a block a row.
template <typename Piece>
__global__ void __launch_bounds__(THREADS) gather(const Piece* x, const int32_t* perm, const int32_t* inverse, Piece* out,
                                                  int64_t rows, int64_t pieces, int chosen) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const bool there = inverse[perm[i]] >= 0;
    const Piece* from = x + perm[i] / chosen * pieces;
    for (int64_t h = threadIdx.x; h < pieces; h += THREADS) out[i * pieces + h] = there ? from[h] : Piece{};
  }
}

// out[t] = sum over n of gates[t, n] * y[inverse[t, n]], in float32 and in the order of n; without gates, of y alone.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS) combine(const T* y, const int32_t* inverse, const float* gates, T* out,
                                                   int64_t tokens, int64_t width, int chosen) {
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x)
    for (int64_t h = threadIdx.x * N; h < width; h += THREADS * N) {
      float sum[N] = {}, part[N];
#pragma unroll 2
      for (int n = 0; n < chosen; ++n) {
        const int64_t row = inverse[token * chosen + n];
        if (row < 0) continue;
        const float gate = gates == nullptr ? 1.0f : gates[token * chosen + n];
        load_piece(y + row * width + h, part);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += gate * part[i];
      }
      store_piece(sum, out + token * width + h);
    }
}

// The gradients of combine by y, [tokens * chosen, width], and by the gates; 0 for slots without an expert. A block a row.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    combine_gradient(const T* grad, const T* y, const int32_t* perm, const int32_t* inverse, const float* gates, T* grad_y,
                     float* grad_gates, int64_t rows, int64_t width, int chosen) {
  MEGACPT_SHARED(shared);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int slot = perm[row];
    const bool there = inverse[slot] >= 0;
    const float gate = gates[slot];
    float dot = 0.0f;
    for (int64_t h = threadIdx.x * N; h < width; h += THREADS * N) {
      float up[N] = {}, value[N];
      if (there) {
        load_piece(grad + slot / chosen * width + h, up);
        load_piece(y + row * width + h, value);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          dot += up[i] * value[i];
          up[i] *= gate;
        }
      }
      store_piece(up, grad_y + row * width + h);
    }
    dot = block_total(dot, reinterpret_cast<float*>(shared));
    if (threadIdx.x == 0) grad_gates[slot] = dot;
    __syncthreads();
  }
}

int grid(int64_t wanted) { return static_cast<int>(wanted < (1 << 20) ? wanted : 1 << 20); }

// Calls run(T{}, width of a piece) for rows of `width` numbers that begin at all of `rows`.
template <typename Run>
int on_pieces(int format, int64_t width, std::initializer_list<const void*> rows, const Run& run) {
  const auto pieces = [&](auto number) {
    using T = decltype(number);
    bool aligned = true;
    for (const void* row : rows) aligned = aligned && aligned_rows<T>(row, width);
    return aligned ? run(number, std::integral_constant<int, VECTOR<T>>{}) : run(number, std::integral_constant<int, 1>{});
  };
  if (format == FLOAT32) return pieces(float{});
  if (format == BFLOAT16) return pieces(BFloat16{});
  if (format == FLOAT16) return pieces(Float16{});
  return -1;
}

}  // namespace
}  // namespace megacpt

// How many tiles the sort of `slots` slots is cut into; its table has (experts + 1) * (tiles + 1) numbers of 32 bits.
MEGACPT_EXPORT int megacpt_cuda_sort_tiles(int64_t slots) {
  const int64_t most = 1024, least = 256;
  const int64_t size = slots <= most * least ? least : (slots + most * 32 - 1) / (most * 32) * 32;
  return slots == 0 ? 1 : static_cast<int>((slots + size - 1) / size);
}

// experts [slots], from 0 to width - 1, or none. Out: perm [slots], the slots by expert, those without one last; inverse
// [slots], where each went, -1 for those without; counts [width].
MEGACPT_EXPORT int megacpt_cuda_moe_sort(const int32_t* experts, int64_t slots, int width, int* table, int32_t* perm,
                                         int32_t* inverse, int64_t* counts, cudaStream_t stream) {
  using namespace megacpt;
  if (width > MOST_EXPERTS || slots > INT32_MAX) return -1;
  const int count = megacpt_cuda_sort_tiles(slots), each = static_cast<int>((slots + count - 1) / count + 31) / 32 * 32;
  const Tiles tiles{slots, each, count, width + 1};
  int* totals = table + static_cast<int64_t>(count) * tiles.buckets;
  const size_t shared = WARPS * tiles.buckets * sizeof(int);
  const int blocks = (count + WARPS - 1) / WARPS;
  int status = launch(count_tiles, blocks, THREADS, shared, stream, false, experts, tiles, table);
  if (status == 0)
    status = launch(scan_tiles, (tiles.buckets + WARPS - 1) / WARPS, THREADS, size_t{0}, stream, false, tiles, table, totals);
  if (status == 0)
    status = launch(place_slots, blocks, THREADS, shared, stream, false, experts, tiles, static_cast<const int*>(table),
                    static_cast<const int*>(totals), perm, inverse, counts);
  return status;
}

MEGACPT_EXPORT int megacpt_cuda_gather(const void* x, int format, const int32_t* perm, const int32_t* inverse, void* out,
                                       int64_t rows,
                                       int64_t width, int chosen, cudaStream_t stream) {
  using namespace megacpt;
  if (rows == 0 || width == 0) return 0;
  return on_pieces(format, width, {x, out}, [&](auto number, auto piece) {
    using T = decltype(number);
    using Piece = std::conditional_t<piece.value == 1, T, uint4>;
    return launch(gather<Piece>, grid(rows), THREADS, size_t{0}, stream, false, static_cast<const Piece*>(x), perm,
                  inverse, static_cast<Piece*>(out), rows, width / piece.value, chosen);
  });
}

MEGACPT_EXPORT int megacpt_cuda_combine(const void* y, int format, const int32_t* inverse, const float* gates, void* out,
                                        int64_t tokens, int64_t width, int chosen, cudaStream_t stream) {
  using namespace megacpt;
  if (tokens == 0 || width == 0) return 0;
  return on_pieces(format, width, {y, out}, [&](auto number, auto piece) {
    using T = decltype(number);
    return launch(combine<T, piece.value>, grid(tokens), THREADS, size_t{0}, stream, false, static_cast<const T*>(y),
                  inverse, gates, static_cast<T*>(out), tokens, width, chosen);
  });
}

MEGACPT_EXPORT int megacpt_cuda_combine_gradient(const void* grad, const void* y, int format, const int32_t* perm,
                                                 const int32_t* inverse, const float* gates, void* grad_y,
                                                 float* grad_gates, int64_t rows, int64_t width, int chosen,
                                                 cudaStream_t stream) {
  using namespace megacpt;
  if (rows == 0) return 0;
  return on_pieces(format, width, {grad, y, grad_y}, [&](auto number, auto piece) {
    using T = decltype(number);
    return launch(combine_gradient<T, piece.value>, grid(rows), THREADS, WARPS * sizeof(float), stream, false,
                  static_cast<const T*>(grad), static_cast<const T*>(y), perm, inverse, gates, static_cast<T*>(grad_y),
                  grad_gates, rows, width, chosen);
  });
}
