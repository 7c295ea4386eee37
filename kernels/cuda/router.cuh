// What the two passes of the router share: how experts are scored, and the gates of the chosen ones.
#pragma once

#include "rows.cuh"

namespace megacpt {

struct Scoring {
  int experts, chosen;
  bool sigmoid, renormalise, bias_on_logits;
  int groups, groups_kept;
  float scale;

  // Whether gates are scores divided by their sum; renormalised softmax scores are a softmax of their own.
  __device__ __forceinline__ bool shared_out() const { return sigmoid && renormalise && chosen > 1; }
  __device__ __forceinline__ bool softmax_of_chosen() const { return !sigmoid && renormalise; }
};

// The gates of a token before the factor, its k experts spread over LANES lanes: gate(n) = weight[n] / sum. `logit[n]`
// holds the logits of this lane's n = lane, lane + LANES, ... and becomes their weights.
template <int LANES>
__device__ __forceinline__ float chosen_weights(const Scoring& scoring, float lse, int lane, float* logit) {
  float top = lse, sum = 0.0f;
  if (scoring.softmax_of_chosen()) {
    top = -INFINITE;
    for (int n = lane; n < scoring.chosen; n += LANES) top = fmaxf(top, logit[n]);
    top = largest<LANES>(top);
  }
  for (int n = lane; n < scoring.chosen; n += LANES) {
    logit[n] = scoring.sigmoid ? sigmoid(logit[n]) : exp_fast(logit[n] - top);
    sum += logit[n];
  }
  sum = total<LANES>(sum);
  return scoring.softmax_of_chosen() ? sum : scoring.shared_out() ? sum + SMALL : 1.0f;
}

}  // namespace megacpt
