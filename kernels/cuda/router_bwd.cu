// The router's backward pass: the gradients of gates, balance loss and z-loss by the logits, joined in one launch that
// reads each logit once and computes the scores again. megacpt/ops/router_reference.py has the equations.

#include "router.cuh"

namespace megacpt {
namespace {

struct Upstream {
  const float* lse;        // [tokens]
  const int32_t* experts;  // [tokens, chosen]
  const float* gates;      // [tokens, chosen], the gradient of the gates
  const float* balance;    // [experts], the coefficients of the routing probabilities
  const float* z;          // [1], the coefficient of the squared log-sum-exp

  // An expert of a token; the first one for masked tokens, whose gradient is replaced.
  __device__ __forceinline__ int expert(int64_t at) const { return experts[at] < 0 ? 0 : experts[at]; }
};

// What the gates add to the gradient by the chosen logits, into `extra` [experts]; returns what they add to the factor
// of all scores. `weight` has room for the chosen.
template <typename Row>
__device__ __forceinline__ float gates_gradient(const typename Row::T* row, const Upstream& up, const Scoring& scoring,
                                                int64_t first, float lse, float* weight, float* extra) {
  const int lane = Row::lane(), k = scoring.chosen;
  for (int n = lane; n < k; n += Row::LANES) weight[n] = widened(row[up.expert(first + n)]);
  const float share = reciprocal_fast(chosen_weights<Row::LANES>(scoring, lse, lane, weight));
  float dot = 0.0f;
  for (int n = lane; n < k; n += Row::LANES) dot += up.gates[first + n] * scoring.scale * (weight[n] * share);
  dot = total<Row::LANES>(dot);
  for (int n = lane; n < k; n += Row::LANES) {
    const float gate = weight[n] * share, grad = up.gates[first + n] * scoring.scale;
    float& to = extra[up.expert(first + n)];
    if (scoring.softmax_of_chosen())
      to = gate * (grad - dot);
    else if (scoring.sigmoid)  // the derivative of the sigmoid is weight * (1 - weight); gate = weight * share
      to = (scoring.shared_out() ? grad - dot : grad) * gate * (1.0f - weight[n]);
    else
      to = grad * gate;
  }
  return scoring.sigmoid || scoring.renormalise ? 0.0f : -dot;
}

// The gradient of a row with meaning, without what gates_gradient adds; `pull` of it.
template <typename Row>
__device__ __forceinline__ void row_gradient(const float (&x)[Row::EACH], const float (&c)[Row::EACH], float lse, float z,
                                             float pull, const Scoring& scoring, float (&result)[Row::EACH]) {
  float dot = 0.0f, all = 0.0f;
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) {
    result[j] = scoring.sigmoid ? sigmoid(x[j]) : exp_fast(x[j] - lse);
    dot += c[j] * result[j];
    all += result[j];
  }
  dot = total<Row::LANES>(dot);
  const float push = 2.0f * z * lse;
  if (!scoring.sigmoid) {
#pragma unroll
    for (int j = 0; j < Row::EACH; ++j) result[j] *= c[j] + (push - dot + pull);
    return;
  }
  const float share = reciprocal_fast(fmaxf(total<Row::LANES>(all), SMALLEST_NORMAL)), mean = dot * share;
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j)
    result[j] = (c[j] - mean) * share * result[j] * (1.0f - result[j]) + push * exp_fast(x[j] - lse);
}

template <typename Row>
__global__ void __launch_bounds__(THREADS, Row::BLOCKS)
    route_gradient(const typename Row::T* logits, typename Row::T* grad, bool aligned, Upstream up, Scoring scoring,
                   int64_t tokens) {
  MEGACPT_SHARED(shared);
  const int count = scoring.experts, k = scoring.chosen;
  float* extra = reinterpret_cast<float*>(shared) + Row::slot() * Row::WIDTH;
  float* weight = reinterpret_cast<float*>(shared) + Row::ROWS * Row::WIDTH + Row::slot() * k;
  float c[Row::EACH];
#pragma unroll
  for (int j = 0; j < Row::EACH; ++j) {
    c[j] = Row::column(j) < count ? up.balance[Row::column(j)] : 0.0f;
    extra[Row::column(j)] = 0.0f;
  }
  const float z = *up.z, nan = bits_as<float>(0x7fffffff);
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * Row::ROWS; start < tokens;
       start += static_cast<int64_t>(gridDim.x) * Row::ROWS) {
    const int64_t token = start + Row::slot();
    const bool there = token < tokens;
    const int64_t from = there ? token : 0, first = from * k;  // threads beyond the end repeat the first row
    const float lse = up.lse[from];
    // Masked and broken rows are worked on like the others, and replaced.
    const bool masked = up.experts[first] < 0, broken = lse != lse;
    float x[Row::EACH], result[Row::EACH];
    Row::load(logits + from * count, count, aligned, x);
    __syncwarp();
    const float pull = gates_gradient<Row>(logits + from * count, up, scoring, first, lse, weight, extra);
    row_gradient<Row>(x, c, lse, z, pull, scoring, result);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Row::EACH; ++j) {
      result[j] += extra[Row::column(j)];
      if (masked || broken) result[j] = masked ? 0.0f : nan;
    }
    __syncwarp();
    for (int n = Row::lane(); n < k; n += Row::LANES) extra[up.expert(first + n)] = 0.0f;
    if (there) Row::store(result, count, aligned, grad + token * count);
  }
}

template <typename Row>
int run(const void* logits, void* grad, const Upstream& up, const Scoring& scoring, int64_t tokens, cudaStream_t stream) {
  using T = typename Row::T;
  const size_t shared = Row::ROWS * (Row::WIDTH + scoring.chosen) * sizeof(float);
  const int64_t wanted = (tokens + Row::ROWS - 1) / Row::ROWS, most = resident_blocks(route_gradient<Row>, THREADS, shared);
  if (wanted == 0) return 0;
  if (most == 0) return -2;
  const bool aligned = aligned_rows<T>(logits, scoring.experts) && aligned_rows<T>(grad, scoring.experts);
  return launch(route_gradient<Row>, static_cast<int>(wanted < most ? wanted : most), THREADS, shared, stream, false,
                static_cast<const T*>(logits), static_cast<T*>(grad), aligned, up, scoring, tokens);
}

}  // namespace
}  // namespace megacpt

MEGACPT_EXPORT int megacpt_cuda_route_gradient(const void* logits, void* grad, int format, const float* lse,
                                               const int32_t* experts, const float* grad_gates, const float* balance,
                                               const float* z, int64_t tokens, int width, int chosen, int sigmoid,
                                               int renormalise, float scale, cudaStream_t stream) {
  using namespace megacpt;
  if (chosen > MOST_CHOSEN) return -1;
  const Scoring scoring{width, chosen, sigmoid != 0, renormalise != 0, false, 1, 1, scale};
  const Upstream up{lse, experts, grad_gates, balance, z};
  return on_rows(format, width, [&](auto row) {
    return run<decltype(row)>(logits, grad, up, scoring, tokens, stream);
  });
}
