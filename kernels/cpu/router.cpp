// C interface of the mixture-of-experts router: threads over tokens, each with sums of its own that are joined at the
// end. They are integers, so that neither the number of threads nor their order changes a bit.

#include "router_rows.h"

#include <mutex>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"

namespace {

using namespace megacpt;

enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int64_t LANES = 16;

int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// A vector of one float an expert, padded as rows are.
std::vector<float> padded_copy(const float* from, int64_t count) {
  std::vector<float> copy(from == nullptr ? 0 : padded(count), 0.0f);
  if (from != nullptr) std::copy(from, from + count, copy.begin());
  return copy;
}

// Calls rows(sums, from, to) on the threads, with sums of their own that are added to `sums`.
template <typename Rows>
void summed(const Sums& sums, int64_t experts, int64_t tokens, int threads, const Rows& rows) {
  std::mutex join;
  parallel_over(tokens, experts * 8, threads, [&](int64_t from, int64_t to) {
    std::vector<int64_t> counts(experts), probabilities(padded(experts));
    int64_t z = 0;
    rows(Sums{counts.data(), probabilities.data(), &z}, from, to);
    const std::lock_guard<std::mutex> lock(join);
    for (int64_t i = 0; i < experts; ++i) {
      sums.counts[i] += counts[i];
      sums.probabilities[i] += probabilities[i];
    }
    *sums.z += z;
  });
}

template <typename T>
void route(const T* logits, const RouterIn& in, const Scoring& scoring, const Routes& routes, const Sums& sums,
           int64_t tokens, int threads, int isa) {
  summed(sums, scoring.experts, tokens, threads, [&](const Sums& own, int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, route_rows(logits, in, scoring, routes, own, from, to));
  });
}

template <typename T>
void gradient(const T* logits, T* grad, const RouterGradient& upstream, const Scoring& scoring, int64_t tokens,
              int threads, int isa) {
  parallel_over(tokens, scoring.experts * 8, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, route_gradient_rows(logits, grad, upstream, scoring, from, to));
  });
}

}  // namespace

extern "C" {

MEGACPT_EXPORT int64_t megacpt_router_limit(int chosen) { return chosen ? MOST_CHOSEN : MOST_EXPERTS; }

// The sums are added to what is there.
MEGACPT_EXPORT void megacpt_route(const void* logits, int format, const float* bias, const uint8_t* mask, float* gates,
                                  int32_t* experts, float* lse, int64_t* counts, int64_t* prob_sum, int64_t* z_sum,
                                  int64_t tokens, int64_t width, int64_t chosen, int sigmoid, int renormalise,
                                  int bias_on_logits, int64_t groups, int64_t groups_kept, float scale, int threads,
                                  int isa) {
  const Scoring scoring{width, chosen, sigmoid, renormalise, bias_on_logits, groups, groups_kept, scale};
  const std::vector<float> wide = padded_copy(bias, width);
  const RouterIn in{bias == nullptr ? nullptr : wide.data(), mask};
  const Routes routes{gates, experts, lse};
  const Sums sums{counts, prob_sum, z_sum};
  if (format == FLOAT32)
    route(static_cast<const float*>(logits), in, scoring, routes, sums, tokens, threads, isa);
  else if (format == BFLOAT16)
    route(static_cast<const BFloat16*>(logits), in, scoring, routes, sums, tokens, threads, isa);
  else
    route(static_cast<const Float16*>(logits), in, scoring, routes, sums, tokens, threads, isa);
}

MEGACPT_EXPORT void megacpt_route_gradient(const void* logits, void* grad, int format, const float* lse,
                                           const int32_t* experts, const float* grad_gates, const float* balance, float z,
                                           int64_t tokens, int64_t width, int64_t chosen, int sigmoid, int renormalise,
                                           float scale, int threads, int isa) {
  const Scoring scoring{width, chosen, sigmoid, renormalise, 0, 1, 1, scale};
  const std::vector<float> wide = padded_copy(balance, width);
  const RouterGradient upstream{lse, experts, grad_gates, wide.data(), z};
  if (format == FLOAT32)
    gradient(static_cast<const float*>(logits), static_cast<float*>(grad), upstream, scoring, tokens, threads, isa);
  else if (format == BFLOAT16)
    gradient(static_cast<const BFloat16*>(logits), static_cast<BFloat16*>(grad), upstream, scoring, tokens, threads, isa);
  else
    gradient(static_cast<const Float16*>(logits), static_cast<Float16*>(grad), upstream, scoring, tokens, threads, isa);
}
}
