// Ternary quantisation of lists of matrices (megacpt/ops/ternarise_reference.py): absolute sums by block, and values,
// codes and counts for given scales. A warp takes a row; the matrices of a list share a launch.

#include <type_traits>

#include "rows.cuh"

namespace megacpt {
namespace {

// One of a list of weights [batch, rows, width] with scales [batch, row_blocks, column_blocks]; the same in memory as the
// structure in megacpt/ops/ternarise_cpu.py.
struct TernaryMatrix {
  const void* weight;
  void* out;            // [batch, rows, width]
  const float* scales;  // [batch, row_blocks, column_blocks]
  uint8_t* packed;      // [batch, rows, (width + 3) / 4], or null
  double* row_sums;     // [batch, rows, column_blocks], workspace
  double* sums;         // [batch, row_blocks, column_blocks]
  int64_t batch;
  int32_t rows, width, halves, row_blocks, column_blocks;
  int32_t aligned;  // set here: rows may be read in whole vectors
};

constexpr int MOST_LISTED = 40;  // matrices of a launch: its parameters have 4 KiB
constexpr int SUM_LANES = 128;   // in which sums are made
constexpr int PIECE = 8;         // numbers that a thread quantises at once
static_assert(THREADS == SUM_LANES, "a thread a lane");

struct List {
  TernaryMatrix matrices[MOST_LISTED];
  int first[MOST_LISTED + 1];  // of all units of work, that of each matrix
  int count;
};

// The matrix that a unit of work belongs to.
__device__ __forceinline__ int matrix_of(const List& list, int unit) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first[middle] <= unit)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// N neighbours, of which `count` are there; the others are 0.
template <int N, typename T>
__device__ __forceinline__ void load(const T* from, int count, bool aligned, float (&x)[N]) {
  using Vector = std::conditional_t<N * sizeof(T) == 8, uint64_t, uint4>;
  T values[N];
  if (aligned) {
#pragma unroll
    for (int i = 0; i < N; i += sizeof(Vector) / sizeof(T)) {
      const Vector vector = *reinterpret_cast<const Vector*>(from + i);
      memcpy(values + i, &vector, sizeof vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = i < count ? from[i] : T{};
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = widened(values[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store(const float (&x)[N], int count, bool aligned, T* to) {
  T values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(x[i], values[i]);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < N; i += 16 / sizeof(T)) {
      uint4 vector;
      memcpy(&vector, values + i, sizeof vector);
      *reinterpret_cast<uint4*>(to + i) = vector;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = values[i];
  }
}

// The absolute sum of `count` numbers, on a warp, to lane 0. A thread has four of the 128 lanes.
template <typename T>
__device__ __forceinline__ double abs_sum(const T* from, int count, bool aligned) {
  double sum[4] = {};
#pragma unroll 4
  for (int j = threadIdx.x % 32 * 4; j < count; j += SUM_LANES) {
    float x[4];
    load(from + j, count - j, aligned, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += static_cast<double>(fabsf(x[i]));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = total<32>(sum[i]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// How many rows a block of scales covers, in both halves together.
__host__ __device__ __forceinline__ int block_rows(const TernaryMatrix& matrix) { return matrix.rows / matrix.row_blocks; }

template <typename T>
__global__ void __launch_bounds__(THREADS) row_sums(List list) {
  for (int unit = blockIdx.x * WARPS + threadIdx.x / 32; unit < list.first[list.count]; unit += gridDim.x * WARPS) {
    const int n = matrix_of(list, unit);
    const TernaryMatrix& matrix = list.matrices[n];
    const int columns = matrix.width / matrix.column_blocks;
    const int64_t row = unit - list.first[n];
    double* out = (block_rows(matrix) == 1 ? matrix.sums : matrix.row_sums) + row * matrix.column_blocks;
    const T* from = static_cast<const T*>(matrix.weight) + row * matrix.width;
    for (int c = 0; c < matrix.column_blocks; ++c) {
      const double sum = abs_sum(from + static_cast<int64_t>(c) * columns, columns, matrix.aligned);
      if (threadIdx.x % 32 == 0) out[c] = sum;
    }
  }
}

// The sums of rows to those of blocks; a block of threads each.
__global__ void __launch_bounds__(THREADS) block_sums(List list) {
  MEGACPT_SHARED(shared);
  double* lanes = reinterpret_cast<double*>(shared);
  for (int unit = blockIdx.x; unit < list.first[list.count]; unit += gridDim.x) {
    const int n = matrix_of(list, unit);
    const TernaryMatrix& matrix = list.matrices[n];
    const int at = unit - list.first[n], column = at % matrix.column_blocks, block = at / matrix.column_blocks;
    const int count = block_rows(matrix), each = count / matrix.halves, part = matrix.rows / matrix.halves;
    const int64_t begin = static_cast<int64_t>(block / matrix.row_blocks) * matrix.rows + block % matrix.row_blocks * each;
    double sum = 0.0;
#pragma unroll 8
    for (int row = threadIdx.x; row < count; row += SUM_LANES) {
      const int64_t place = begin + (row < each ? row : part + row - each);
      sum += matrix.row_sums[place * matrix.column_blocks + column];
    }
    lanes[threadIdx.x] = sum;
    __syncthreads();
#pragma unroll
    for (int half = SUM_LANES / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) matrix.sums[at] = lanes[0];
    __syncthreads();
  }
}

// Quantises numbers j to j + PIECE - 1 of a row. There is no division: the code is 1 where 2 w > scale, which is where
// the quotient rounds to 1 (kernels/cpu/ternarise_rows.cpp says why).
template <typename T, typename Out>
__device__ __forceinline__ void quantise(const TernaryMatrix& matrix, const float* scales, int64_t row, int j, bool aligned,
                                         unsigned columns, int& zeros, int& flips) {
  const int count = matrix.width - j;
  Out* out = static_cast<Out*>(matrix.out) + row * matrix.width + j;
  float x[PIECE], former[PIECE], value[PIECE];
  load(static_cast<const T*>(matrix.weight) + row * matrix.width + j, count, aligned, x);
  load(out, count, aligned, former);
  float scale = scales[matrix.column_blocks == 1 ? 0 : static_cast<unsigned>(j) / columns];
  unsigned codes = 0;
#pragma unroll
  for (int i = 0; i < PIECE; ++i) {
    const bool there = aligned || i < count;
    if (!aligned && matrix.column_blocks > 1 && there) scale = scales[static_cast<unsigned>(j + i) / columns];
    const bool up = x[i] + x[i] > scale, down = x[i] + x[i] < -scale;
    value[i] = x[i] != x[i] ? x[i] : up ? scale : down ? -scale : scale - scale;
    const bool same = up ? former[i] > 0.0f : down ? former[i] < 0.0f : !(former[i] > 0.0f || former[i] < 0.0f);
    zeros += there && !up && !down;
    flips += there && !same;
    codes |= (up ? 2u : down ? 0u : 1u) << 2 * i;
  }
  store(value, count, aligned, out);
  if (matrix.packed == nullptr) return;
  uint8_t* packed = matrix.packed + row * ((matrix.width + 3) / 4) + j / 4;
  if (aligned) {
    *reinterpret_cast<uint16_t*>(packed) = static_cast<uint16_t>(codes);
  } else {
    packed[0] = static_cast<uint8_t>(codes);
    if (count > 4) packed[1] = static_cast<uint8_t>(codes >> 8);
  }
}

// counts [matrices, 2]: zeros and flips are added.
template <typename T, typename Out>
__global__ void __launch_bounds__(THREADS) ternarise(List list, unsigned long long* counts) {
  for (int unit = blockIdx.x * WARPS + threadIdx.x / 32; unit < list.first[list.count]; unit += gridDim.x * WARPS) {
    const int n = matrix_of(list, unit), row = unit - list.first[n];
    const TernaryMatrix& matrix = list.matrices[n];
    const int part = matrix.rows / matrix.halves, each = part / matrix.row_blocks;
    const int64_t block = static_cast<int64_t>(row / matrix.rows) * matrix.row_blocks + row % matrix.rows % part / each;
    const float* scales = matrix.scales + block * matrix.column_blocks;
    int zeros = 0, flips = 0;
    const unsigned columns = matrix.width / matrix.column_blocks;
    const int first = threadIdx.x % 32 * PIECE;
    if (matrix.aligned)
      for (int j = first; j < matrix.width; j += 32 * PIECE)
        quantise<T, Out>(matrix, scales, row, j, true, columns, zeros, flips);
    else
      for (int j = first; j < matrix.width; j += 32 * PIECE)
        quantise<T, Out>(matrix, scales, row, j, false, columns, zeros, flips);
    zeros = total<32>(zeros);
    flips = total<32>(flips);
    if (threadIdx.x % 32 == 0) {
      atomicAdd(&counts[2 * n], static_cast<unsigned long long>(zeros));
      atomicAdd(&counts[2 * n + 1], static_cast<unsigned long long>(flips));
    }
  }
}

template <typename T>
bool begins_vector(const T* pointer, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

bool can_be_vectors(const TernaryMatrix& matrix) {
  return matrix.width / matrix.column_blocks % PIECE == 0 && begins_vector(matrix.weight) && begins_vector(matrix.out) &&
         begins_vector(matrix.packed, 2);
}

// Calls run(list, index of its first matrix) for pieces of the list; units(matrix) is the work of one.
template <typename Units, typename Run>
int on_lists(const TernaryMatrix* matrices, int count, const Units& units, const Run& run) {
  int status = 0;
  for (int from = 0; from < count && status == 0; from += MOST_LISTED) {
    List list{};
    list.count = count - from < MOST_LISTED ? count - from : MOST_LISTED;
    int64_t all = 0;
    for (int n = 0; n < list.count; ++n) {
      list.matrices[n] = matrices[from + n];
      list.matrices[n].aligned = can_be_vectors(matrices[from + n]);
      list.first[n] = static_cast<int>(all);
      all += units(matrices[from + n]);
      if (all > INT32_MAX) return -1;
    }
    list.first[list.count] = static_cast<int>(all);
    if (all > 0) status = run(list, from);
  }
  return status;
}

template <typename Kernel, typename... Parameters>
int launch_units(Kernel kernel, int64_t units, int each, size_t shared, cudaStream_t stream, Parameters... parameters) {
  const int64_t wanted = (units + each - 1) / each, most = resident_blocks(kernel, THREADS, shared);
  if (most == 0) return -2;
  return launch(kernel, static_cast<int>(wanted < most ? wanted : most), THREADS, shared, stream, false, parameters...);
}

int64_t all_rows(const TernaryMatrix& matrix) { return matrix.batch * matrix.rows; }

template <typename T>
int abs_sums(const TernaryMatrix* matrices, int count, cudaStream_t stream) {
  const int status = on_lists(matrices, count, all_rows, [&](const List& list, int) {
    return launch_units(row_sums<T>, list.first[list.count], WARPS, size_t{0}, stream, list);
  });
  if (status != 0) return status;
  const auto blocks = [](const TernaryMatrix& matrix) -> int64_t {
    return block_rows(matrix) == 1 ? 0 : matrix.batch * matrix.row_blocks * matrix.column_blocks;
  };
  return on_lists(matrices, count, blocks, [&](const List& list, int) {
    return launch_units(block_sums, list.first[list.count], 1, SUM_LANES * sizeof(double), stream, list);
  });
}

template <typename T, typename Out>
int ternarise_all(const TernaryMatrix* matrices, int count, unsigned long long* counts, cudaStream_t stream) {
  return on_lists(matrices, count, all_rows, [&](const List& list, int from) {
    return launch_units(ternarise<T, Out>, list.first[list.count], WARPS, size_t{0}, stream, list, counts + 2 * from);
  });
}

}  // namespace
}  // namespace megacpt

// Fills the `sums` of all matrices, which are of one format.
MEGACPT_EXPORT int megacpt_cuda_block_abs_sums(const void* matrices, int count, int format, cudaStream_t stream) {
  using namespace megacpt;
  const auto* list = static_cast<const TernaryMatrix*>(matrices);
  if (format == FLOAT32) return abs_sums<float>(list, count, stream);
  if (format == BFLOAT16) return abs_sums<BFloat16>(list, count, stream);
  if (format == FLOAT16) return abs_sums<Float16>(list, count, stream);
  return -1;
}

// Fills `out` (and `packed`) of all matrices, of one format each for weights and values; counts [count, 2], zero before.
MEGACPT_EXPORT int megacpt_cuda_ternarise(const void* matrices, int count, int format, int out_format,
                                          unsigned long long* counts, cudaStream_t stream) {
  using namespace megacpt;
  const auto* list = static_cast<const TernaryMatrix*>(matrices);
  if (format == BFLOAT16 && out_format == BFLOAT16) return ternarise_all<BFloat16, BFloat16>(list, count, counts, stream);
  if (format == FLOAT16 && out_format == FLOAT16) return ternarise_all<Float16, Float16>(list, count, counts, stream);
  if (format != FLOAT32) return -1;
  if (out_format == BFLOAT16) return ternarise_all<float, BFloat16>(list, count, counts, stream);
  if (out_format == FLOAT16) return ternarise_all<float, Float16>(list, count, counts, stream);
  return ternarise_all<float, float>(list, count, counts, stream);
}
