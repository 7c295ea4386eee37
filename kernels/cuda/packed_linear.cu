// The product of a few tokens with a packed ternary matrix, and the matrix unpacked for many
// (megacpt/ops/packed_linear_reference.py, activations as they are).
//
// The matrix lies in tiles of 16 rows by 128 columns, 512 bytes each, in the order in which a warp's threads feed them to
// its tensor cores: one load of 16 bytes a thread. Two bits are a sign and whether there is a number: moved to the top of
// a bfloat16, they are 0, 2 or -2. So a pair of weights is unpacked by one shift and one mask, and the 2 is taken out of
// the scales. Weights are the operand of 16 rows, so that even one token uses tensor cores.

#include <type_traits>

#include "packed_linear.cuh"

namespace megacpt {
namespace {

constexpr int TILE_ROWS = 16, TILE_COLUMNS = 128;
constexpr int STRIDE = TILE_COLUMNS + 8;  // of tokens in shared memory: no two threads of a load meet in a bank
constexpr int LEAST_STEPS = 2;            // tiles beside each other that are worth a block
constexpr unsigned PAIR = 0xc000c000u;

struct Product {
  const uint4* tiles;         // [row tiles, steps, 32]
  const float* scales;        // [rows, groups]
  const BFloat16* x;          // [tokens, width]
  BFloat16* out;              // [tokens, rows]
  float* partial;             // [row blocks, splits, numbers of a block], if there are splits
  unsigned* arrived;          // [row blocks], zero before and after
  int tokens, rows, width, groups, steps, splits;
};

// What a block computes: 8 * NS tokens by 64 * MS rows, MS tiles a warp.
template <int NS_, int MS_, bool GROUPED_>
struct Shape {
  static constexpr int NS = NS_, MS = MS_;
  static constexpr bool GROUPED = GROUPED_;  // a scale for each group of columns
  static constexpr int TOKENS = 8 * NS, ROWS = WARPS * MS * TILE_ROWS;
  static constexpr int STAGES = NS == 8 ? 2 : 4;
  static constexpr int STAGE = TOKENS * STRIDE;  // numbers
  static constexpr size_t SHARED = STAGES * STAGE * sizeof(BFloat16);
  static constexpr int NUMBERS = TOKENS * ROWS;
};

// The weights 2 p and 2 p + 1 of a thread's row, doubled.
__device__ __forceinline__ uint32_t pair_of(uint32_t word, int p) { return word << 2 * p & PAIR; }

// Begins to copy the columns of a step, of all tokens.
template <typename S>
__device__ __forceinline__ void begin_step(const Product& product, int step, BFloat16* stage) {
  const int first = threadIdx.x / 16, place = threadIdx.x % 16 * 8, column = step * TILE_COLUMNS + place;
  static_assert(THREADS / 16 == 8 && TILE_COLUMNS / 8 == 16, "8 tokens a round");
#pragma unroll
  for (int n = 0; n < S::NS; ++n) {
    const int token = n * 8 + first;
    const bool there = token < product.tokens && column < product.width;
    begin_copy(stage + token * STRIDE + place, product.x + (there ? token * product.width + column : 0), there);
  }
}

// Where a thread's part of the tiles of its warp begins; tiles beyond the last row are the last one's, and nothing is
// written of them.
template <typename S>
__device__ __forceinline__ void find_tiles(const Product& product, int tile, unsigned (&from)[S::MS]) {
  const int last = (product.rows + TILE_ROWS - 1) / TILE_ROWS - 1;
#pragma unroll
  for (int m = 0; m < S::MS; ++m)
    from[m] = static_cast<unsigned>(tile + m < last ? tile + m : last) * product.steps * 32 + threadIdx.x % 32;
}

template <typename S>
__device__ __forceinline__ void load_tiles(const uint4* tiles, const unsigned (&from)[S::MS], int step,
                                           uint4 (&weights)[S::MS]) {
#pragma unroll
  for (int m = 0; m < S::MS; ++m) weights[m] = tiles[from[m] + step * 32];
}

// A step: sum += tiles times tokens. A thread's 16 columns of each half are neighbours, for weights and tokens alike.
template <typename S>
__device__ __forceinline__ void add_step(const uint4 (&weights)[S::MS], const BFloat16* stage,
                                         float (&sum)[S::MS][S::NS][4]) {
  const int lane = threadIdx.x % 32;
  const BFloat16* from = stage + lane / 4 * STRIDE + lane % 4 * 16;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    uint4 x[S::NS];
#pragma unroll
    for (int n = 0; n < S::NS; ++n)
      x[n] = *reinterpret_cast<const uint4*>(from + n * 8 * STRIDE + quarter / 2 * 64 + quarter % 2 * 8);
#pragma unroll
    for (int m = 0; m < S::MS; ++m) {
      const uint32_t upper = quarter < 2 ? weights[m].x : weights[m].z, lower = quarter < 2 ? weights[m].y : weights[m].w;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int p = quarter % 2 * 4 + half * 2;
        const uint32_t a[4] = {pair_of(upper, p), pair_of(lower, p), pair_of(upper, p + 1), pair_of(lower, p + 1)};
#pragma unroll
        for (int n = 0; n < S::NS; ++n)
          multiply_add(sum[m][n], a, half == 0 ? x[n].x : x[n].z, half == 0 ? x[n].y : x[n].w);
      }
    }
  }
}

// The scale of a number of a thread: i = 0, 1 lie in the upper row of its tile, 2, 3 in the lower one.
__device__ __forceinline__ float half_scale(const Product& product, int tile, int i, int group) {
  const int row = tile * TILE_ROWS + threadIdx.x % 32 / 4 + i / 2 * 8;
  return row < product.rows ? 0.5f * product.scales[static_cast<int64_t>(row) * product.groups + group] : 0.0f;
}

// At the end of a group: total += scale sum, and the sum begins again.
template <typename S>
__device__ __forceinline__ void close_group(const Product& product, int tile, int group, float (&sum)[S::MS][S::NS][4],
                                            float (&all)[S::MS][S::NS][4]) {
#pragma unroll
  for (int m = 0; m < S::MS; ++m) {
    const float scales[2] = {half_scale(product, tile + m, 0, group), half_scale(product, tile + m, 2, group)};
#pragma unroll
    for (int n = 0; n < S::NS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        all[m][n][i] += scales[i / 2] * sum[m][n][i];
        sum[m][n][i] = 0.0f;
      }
  }
}

// Adds up what the blocks of a row block found, in their order, in the one that is done last; true there.
template <typename S>
__device__ __forceinline__ bool joined_splits(const Product& product, int row_block, int split, bool* last,
                                              float (&sum)[S::MS][S::NS][4]) {
  float* mine = product.partial + static_cast<int64_t>(row_block) * product.splits * S::NUMBERS + threadIdx.x * 4;
  const int token = threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < S::MS; ++m)
#pragma unroll
    for (int n = 0; n < S::NS; ++n) {
      uint4 piece;
      memcpy(&piece, sum[m][n], sizeof piece);
      if (n * 8 + token < product.tokens)
        *reinterpret_cast<uint4*>(mine + split * S::NUMBERS + (m * S::NS + n) * THREADS * 4) = piece;
    }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(&product.arrived[row_block], 1u) == static_cast<unsigned>(product.splits) - 1;
  __syncthreads();
  if (!*last) return false;
  __threadfence();
#pragma unroll
  for (int m = 0; m < S::MS; ++m)
#pragma unroll
    for (int n = 0; n < S::NS; ++n) {
      float all[4] = {};
      for (int other = 0; other < product.splits && n * 8 + token < product.tokens; ++other) {
        const uint4 piece =
            __ldcg(reinterpret_cast<const uint4*>(mine + other * S::NUMBERS + (m * S::NS + n) * THREADS * 4));
        float found[4];
        memcpy(found, &piece, sizeof piece);
#pragma unroll
        for (int i = 0; i < 4; ++i) all[i] += found[i];
      }
      memcpy(sum[m][n], all, sizeof all);
    }
  if (threadIdx.x == 0) product.arrived[row_block] = 0;
  return true;
}

template <typename S>
__device__ __forceinline__ void store(const Product& product, int tile, const float (&sum)[S::MS][S::NS][4]) {
#pragma unroll
  for (int m = 0; m < S::MS; ++m) {
    const int row = (tile + m) * TILE_ROWS + threadIdx.x % 32 / 4;
    const float scales[2] = {S::GROUPED ? 1.0f : half_scale(product, tile + m, 0, 0),
                             S::GROUPED ? 1.0f : half_scale(product, tile + m, 2, 0)};
#pragma unroll
    for (int n = 0; n < S::NS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (token < product.tokens && row + i / 2 * 8 < product.rows)
          narrow(scales[i / 2] * sum[m][n][i], product.out[static_cast<int64_t>(token) * product.rows + row + i / 2 * 8]);
      }
  }
}

template <typename S>
__global__ void __launch_bounds__(THREADS, 2) packed_product(Product product) {
  MEGACPT_SHARED(shared);
  BFloat16* stages = reinterpret_cast<BFloat16*>(shared);
  const int row_block = blockIdx.x / product.splits, split = blockIdx.x % product.splits;
  const int first = product.steps * split / product.splits, last = product.steps * (split + 1) / product.splits;
  const int tile = (row_block * WARPS + threadIdx.x / 32) * S::MS;
  float sum[S::MS][S::NS][4] = {}, all[S::GROUPED ? S::MS : 1][S::GROUPED ? S::NS : 1][4] = {};
  unsigned from[S::MS];
  uint4 weights[2][S::MS];  // of this step and the next one
  find_tiles<S>(product, tile, from);
  load_tiles<S>(product.tiles, from, first, weights[0]);
#pragma unroll
  for (int n = 0; n < S::STAGES - 1; ++n) {
    if (first + n < last) begin_step<S>(product, first + n, stages + n * S::STAGE);
    close_copies();
  }
  for (int begin = first; begin < last; begin += S::STAGES) {
#pragma unroll
    for (int n = 0; n < S::STAGES; ++n) {
      const int step = begin + n, ahead = step + S::STAGES - 1;
      if (step >= last) break;
      await_copies<S::STAGES - 2>();
      __syncthreads();  // all copies of the step are here, and nobody reads the stage that is filled next any more
      if (ahead < last) begin_step<S>(product, ahead, stages + (n + S::STAGES - 1) % S::STAGES * S::STAGE);
      close_copies();
      load_tiles<S>(product.tiles, from, step + 1 < last ? step + 1 : step, weights[(n + 1) % 2]);
      add_step<S>(weights[n % 2], stages + n * S::STAGE, sum);
      if constexpr (S::GROUPED) {
        const int each = product.steps / product.groups;
        if ((step + 1) % each == 0 || step + 1 == last) close_group<S>(product, tile, step / each, sum, all);
      }
    }
  }
  await_copies<0>();
  __syncthreads();
  if constexpr (S::GROUPED) memcpy(sum, all, sizeof sum);
  if (product.splits > 1 && !joined_splits<S>(product, row_block, split, reinterpret_cast<bool*>(shared), sum)) return;
  store<S>(product, tile, sum);
}

// Formats that a matrix is unpacked to: codes as bfloat16 or float8 e4m3, for scales that a product's end applies, or
// values as bfloat16.
enum Unpacked { CODES_BFLOAT16 = 0, CODES_FLOAT8 = 1, VALUES_BFLOAT16 = 2 };

// out [rows, width]: a thread unpacks its part of a tile, two rows by two times 16 columns.
template <typename Out>
__global__ void __launch_bounds__(THREADS) unpack(const uint4* tiles, const float* scales, Out* out, int rows, int width,
                                                  int groups, int steps) {
  const int64_t count = static_cast<int64_t>((rows + TILE_ROWS - 1) / TILE_ROWS) * steps;
  const int lane = threadIdx.x % 32;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; at < count;
       at += static_cast<int64_t>(gridDim.x) * WARPS) {
    const uint4 tile = __ldcg(tiles + at * 32 + lane);
    const uint32_t words[4] = {tile.x, tile.y, tile.z, tile.w};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int row = static_cast<int>(at / steps) * TILE_ROWS + lane / 4 + n % 2 * 8;
      const int column = static_cast<int>(at % steps) * TILE_COLUMNS + n / 2 * 64 + lane % 4 * 16;
      if (row >= rows) continue;
      alignas(16) Out values[16];
      const float scale = scales == nullptr ? 1.0f : scales[static_cast<int64_t>(row) * groups + column / (width / groups)];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t pair = pair_of(words[n], i / 2), half = i % 2 == 0 ? pair & 0xffffu : pair >> 16;
        if constexpr (sizeof(Out) == 1)
          values[i] = static_cast<Out>((half & 0x4000u) == 0 ? 0u : 0x38u | (half >> 8 & 0x80u));
        else
          narrow(0.5f * scale * widened(BFloat16{static_cast<uint16_t>(half)}), values[i]);
      }
#pragma unroll
      for (int i = 0; i < 16; i += 16 / sizeof(Out)) {
        uint4 piece;
        memcpy(&piece, values + i, sizeof piece);
        if (column + i < width) *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * width + column + i) = piece;
      }
    }
  }
}

// Calls run(Shape{}) with the smallest shape that the tokens fit in; -1 if none does.
template <typename Run>
int on_shapes(int tokens, int groups, const Run& run) {
  const auto shape = [&](auto grouped) {
    constexpr bool GROUPED = decltype(grouped)::value;
    if (tokens <= 8) return run(Shape<1, 4, GROUPED>{});
    if (tokens <= 16) return run(Shape<2, 4, GROUPED>{});
    if (tokens <= 32) return run(Shape<4, 4, GROUPED>{});
    if (tokens <= 64) return run(Shape<8, GROUPED ? 2 : 4, GROUPED>{});
    return -1;
  };
  return groups > 1 ? shape(std::true_type{}) : shape(std::false_type{});
}

template <typename S>
int row_blocks(int rows) { return (rows + S::ROWS - 1) / S::ROWS; }

int steps_of(int width) { return (width + TILE_COLUMNS - 1) / TILE_COLUMNS; }

}  // namespace
}  // namespace megacpt

// Into how many blocks the columns of a product are best cut, so that all blocks run at once.
MEGACPT_EXPORT int megacpt_cuda_packed_splits(int tokens, int rows, int width, int groups) {
  using namespace megacpt;
  return on_shapes(tokens, groups, [&](auto shape) {
    using S = decltype(shape);
    const int most = resident_blocks(packed_product<S>, THREADS, S::SHARED) / row_blocks<S>(rows);
    const int useful = steps_of(width) / LEAST_STEPS;
    const int splits = most < useful ? most : useful;
    return splits < 1 ? 1 : splits;
  });
}

// How many row blocks a product has, and by `numbers` how many float32 `partial` must have room for.
MEGACPT_EXPORT int megacpt_cuda_packed_blocks(int tokens, int rows, int groups, int splits, int64_t* numbers) {
  using namespace megacpt;
  return on_shapes(tokens, groups, [&](auto shape) {
    using S = decltype(shape);
    *numbers = splits > 1 ? static_cast<int64_t>(splits) * row_blocks<S>(rows) * S::NUMBERS : 0;
    return row_blocks<S>(rows);
  });
}

// Up to 64 tokens; width divisible by 8, below 2^25, and with several groups each of them by 128; x aligned
// to 16 bytes.
MEGACPT_EXPORT int megacpt_cuda_packed_product(const void* tiles, const float* scales, const void* x, void* out,
                                               float* partial, unsigned* arrived, int tokens, int rows, int width,
                                               int groups, int splits, cudaStream_t stream) {
  using namespace megacpt;
  if (static_cast<int64_t>(rows) * width >= int64_t{1} << 36) return -1;  // places in tiles have 32 bits
  if (width % 8 != 0 || width >= 1 << 25 || (groups > 1 && width % (groups * TILE_COLUMNS) != 0)) return -1;
  const Product product{static_cast<const uint4*>(tiles), scales, static_cast<const BFloat16*>(x),
                        static_cast<BFloat16*>(out), partial, arrived, tokens, rows, width, groups, steps_of(width),
                        splits};
  return on_shapes(tokens, groups, [&](auto shape) {
    using S = decltype(shape);
    return launch(packed_product<S>, row_blocks<S>(rows) * splits, THREADS, S::SHARED, stream, false, product);
  });
}

// out [rows, width] in a format of `Unpacked`; width divisible by 16, and each group too.
MEGACPT_EXPORT int megacpt_cuda_unpack(const void* tiles, const float* scales, void* out, int format, int rows, int width,
                                       int groups, cudaStream_t stream) {
  using namespace megacpt;
  if (width % (16 * groups) != 0) return -1;
  const int64_t wanted = (static_cast<int64_t>((rows + TILE_ROWS - 1) / TILE_ROWS) * steps_of(width) + WARPS - 1) / WARPS;
  const auto run = [&](auto number) {
    using Out = decltype(number);
    const int64_t most = resident_blocks(unpack<Out>, THREADS, 0);
    if (most == 0) return -2;
    return launch(unpack<Out>, static_cast<int>(wanted < most ? wanted : most), THREADS, size_t{0}, stream, false,
                  static_cast<const uint4*>(tiles), format == VALUES_BFLOAT16 ? scales : nullptr, static_cast<Out*>(out),
                  rows, width, groups, steps_of(width));
  };
  return format == CODES_FLOAT8 ? run(uint8_t{}) : run(BFloat16{});
}
