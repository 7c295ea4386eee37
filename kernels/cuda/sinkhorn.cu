// Sinkhorn's algorithm for balanced routing (megacpt/ops/sinkhorn.py): the column sums of one iteration, for ranks that
// add theirs, and the whole loop in one launch, which tests convergence on the device.

#include "rows.cuh"

namespace megacpt {
namespace {

constexpr double FARTHEST = 200.0;

// Adds softmax(logits + log_u) of this block's tokens to `sums`; masked and broken tokens are left out.
template <typename Row>
__device__ __forceinline__ void add_softmax(const typename Row::T* logits, bool aligned, const uint8_t* mask,
                                            const float (&log_u)[Row::EACH], int count, int64_t tokens,
                                            long long (&sums)[Row::EACH]) {
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * Row::ROWS; first < tokens;
       first += static_cast<int64_t>(gridDim.x) * Row::ROWS) {
    const int64_t token = first + Row::slot();
    const bool there = token < tokens && (mask == nullptr || mask[token]);
    float x[Row::EACH], p[Row::EACH], lse;
    Row::load(logits + (there ? token : 0) * count, count, aligned, x);
#pragma unroll
    for (int j = 0; j < Row::EACH; ++j) x[j] += log_u[j];
    const bool valid = softmax<Row>(x, p, lse) && there;
#pragma unroll
    for (int j = 0; j < Row::EACH; ++j) {
      const int fixed = fixed_probability(p[j]);
      sums[j] += valid ? fixed : 0;
    }
  }
}

template <typename Row>
__global__ void __launch_bounds__(THREADS, Row::BLOCKS)
    softmax_sums(const typename Row::T* logits, bool aligned, const float* log_u, const uint8_t* mask, long long* out,
                 Workspace work, int count, int64_t tokens) {
  MEGACPT_SHARED(shared);
  float u[Row::EACH];
  long long sums[Row::EACH] = {};
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) u[j] = Row::column(j) < count ? log_u[Row::column(j)] : 0.0f;
  add_softmax<Row>(logits, aligned, mask, u, count, tokens, sums);
  Row::add_columns(sums, reinterpret_cast<unsigned long long*>(shared), count, work.sums);
  move_out(work, count, reinterpret_cast<bool*>(shared), [&](int i, long long sum) { out[i] = sum; });
}

// Moves log_u [count] against the load that it led to; returns the mean relative imbalance. Every block does the same.
__device__ __forceinline__ double improve(double* log_u, const unsigned long long* load, int count, void* shared) {
  long long mine = 0;
  for (int e = threadIdx.x; e < count; e += THREADS) mine += static_cast<long long>(__ldcg(&load[e]));
  const long long all = block_total(mine, static_cast<long long*>(shared));
  const double sum = all < 1 ? 1.0 : static_cast<double>(all), least = count / (sum + 1.0);
  double error = 0.0, level = 0.0;
  for (int e = threadIdx.x; e < count; e += THREADS) {
    const double share = count * static_cast<double>(static_cast<long long>(__ldcg(&load[e]))) / sum;
    error += fabs(share - 1.0);
    log_u[e] -= log(share > least ? share : least);
    level += log_u[e];
  }
  error = block_total(error, static_cast<double*>(shared)) / count;
  level = block_total(level, static_cast<double*>(shared)) / count;
  for (int e = threadIdx.x; e < count; e += THREADS) {
    const double value = log_u[e] - level;
    log_u[e] = value < -FARTHEST ? -FARTHEST : value > FARTHEST ? FARTHEST : value;
  }
  __syncthreads();
  return error;
}

struct Loop {
  const double* start;       // [experts]
  const uint8_t* mask;       // [tokens] or null
  unsigned long long* loads;  // [most_iterations, experts], zero
  unsigned long long* arrived;  // [1], zero
  double* log_u;             // out, [experts]
  double* summary;           // out, [2]: iterations, error
  double tolerance;
  int most_iterations;
};

template <typename Row>
__global__ void __launch_bounds__(THREADS, Row::BLOCKS)
    balance(const typename Row::T* logits, bool aligned, Loop loop, int count, int64_t tokens) {
  MEGACPT_SHARED(shared);
  double* log_u = reinterpret_cast<double*>(shared);
  unsigned char* scratch = shared + Row::WIDTH * sizeof(double);
  for (int e = threadIdx.x; e < count; e += THREADS) log_u[e] = loop.start[e];
  __syncthreads();
  double error = 0.0;
  int made = 0;
  while (made < loop.most_iterations) {
    unsigned long long* load = loop.loads + static_cast<int64_t>(made) * count;
    float u[Row::EACH];
    long long sums[Row::EACH] = {};
#pragma unroll
    for (int j = 0; j < Row::EACH; ++j) u[j] = Row::column(j) < count ? static_cast<float>(log_u[Row::column(j)]) : 0.0f;
    add_softmax<Row>(logits, aligned, loop.mask, u, count, tokens, sums);
    Row::add_columns(sums, reinterpret_cast<unsigned long long*>(scratch), count, load);
    grid_barrier(loop.arrived, ++made);
    error = improve(log_u, load, count, scratch);
    if (error <= loop.tolerance) break;  // all blocks have seen the same integers, so all leave here
  }
  if (blockIdx.x != 0) return;
  for (int e = threadIdx.x; e < count; e += THREADS) loop.log_u[e] = log_u[e];
  if (threadIdx.x == 0) {
    loop.summary[0] = made;
    loop.summary[1] = error;
  }
}

}  // namespace
}  // namespace megacpt

MEGACPT_EXPORT int megacpt_cuda_softmax_sums(const void* logits, int format, const float* log_u, const uint8_t* mask,
                                             long long* sums, unsigned long long* work, int64_t tokens, int width,
                                             cudaStream_t stream) {
  using namespace megacpt;
  return on_rows(format, width, [&](auto row) {
    using Row = decltype(row);
    using T = typename Row::T;
    const size_t shared = WARPS * Row::WIDTH * 8;
    const int64_t wanted = (tokens + Row::ROWS - 1) / Row::ROWS, most = resident_blocks(softmax_sums<Row>, THREADS, shared);
    if (most == 0) return -2;
    return launch(softmax_sums<Row>, static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most), THREADS, shared,
                  stream, false, static_cast<const T*>(logits), aligned_rows<T>(logits, width), log_u, mask, sums,
                  Workspace{work, work + 1}, width, tokens);
  });
}

// `zeros`: 1 + most_iterations * width numbers of 64 bits, zero. `summary`: the iterations made and the last error.
MEGACPT_EXPORT int megacpt_cuda_sinkhorn(const void* logits, int format, const double* start, const uint8_t* mask,
                                         unsigned long long* zeros, double* log_u, double* summary, double tolerance,
                                         int most_iterations, int64_t tokens, int width, cudaStream_t stream) {
  using namespace megacpt;
  const Loop loop{start, mask, zeros + 1, zeros, log_u, summary, tolerance, most_iterations};
  return on_rows(format, width, [&](auto row) {
    using Row = decltype(row);
    using T = typename Row::T;
    const size_t shared = (1 + WARPS) * Row::WIDTH * 8;
    const int64_t wanted = (tokens + Row::ROWS - 1) / Row::ROWS, most = resident_blocks(balance<Row>, THREADS, shared);
    if (most == 0) return -2;
    return launch(balance<Row>, static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most), THREADS, shared, stream,
                  true, static_cast<const T*>(logits), aligned_rows<T>(logits, width), loop, width, tokens);
  });
}
