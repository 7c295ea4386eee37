// C interface of Sinkhorn's algorithm: column sums over threads, the step that follows from them, and both in a loop.
// The sums are integers and the step is computed from them alone, so that neither threads nor ranks change a bit.

#include "sinkhorn_rows.h"

#include <cmath>
#include <mutex>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"

namespace {

using namespace megacpt;

enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int64_t LANES = 16;
constexpr double FARTHEST = 200.0;  // an expert whose logits are all -inf would be pushed for ever

int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

struct Logits {
  const void* values;
  int format;
  const uint8_t* mask;
  int64_t tokens, width;
  int threads, isa;
};

template <typename T>
void add_sums(const Logits& logits, const Balancing& in, int64_t* sums) {
  std::mutex join;
  parallel_over(logits.tokens, logits.width * 4, logits.threads, [&](int64_t from, int64_t to) {
    std::vector<int64_t> own(padded(logits.width));
    MEGACPT_ON_ISA(logits.isa, softmax_sum_rows(static_cast<const T*>(logits.values), in, own.data(), from, to));
    const std::lock_guard<std::mutex> lock(join);
    for (int64_t e = 0; e < logits.width; ++e) sums[e] += own[e];
  });
}

// The sums over tokens of softmax(logits + log u), in fixed point.
void softmax_sums(const Logits& logits, const float* log_u, int64_t* sums) {
  std::vector<float> wide(padded(logits.width), 0.0f);
  std::copy(log_u, log_u + logits.width, wide.begin());
  std::fill(sums, sums + logits.width, 0);
  const Balancing in{wide.data(), logits.mask, logits.width};
  if (logits.format == FLOAT32)
    add_sums<float>(logits, in, sums);
  else if (logits.format == BFLOAT16)
    add_sums<BFloat16>(logits, in, sums);
  else
    add_sums<Float16>(logits, in, sums);
}

// Moves log u against the load that it leads to; returns how far the load was from even.
double improve(const int64_t* load, int64_t width, double* log_u) {
  int64_t total = 0;
  for (int64_t e = 0; e < width; ++e) total += load[e];
  const double all = total > 0 ? static_cast<double>(total) : 1.0, experts = static_cast<double>(width);
  double error = 0.0, mean = 0.0;
  for (int64_t e = 0; e < width; ++e) {
    const double share = experts * static_cast<double>(load[e]) / all;
    error += std::fabs(share - 1.0);
    log_u[e] -= std::log(std::max(share, experts / (all + 1.0)));
    mean += log_u[e];
  }
  mean /= experts;
  for (int64_t e = 0; e < width; ++e) log_u[e] = std::min(std::max(log_u[e] - mean, -FARTHEST), FARTHEST);
  return error / experts;
}

}  // namespace

extern "C" {

MEGACPT_EXPORT void megacpt_softmax_sums(const void* logits, int format, const float* log_u, const uint8_t* mask,
                                         int64_t* sums, int64_t tokens, int64_t width, int threads, int isa) {
  softmax_sums({logits, format, mask, tokens, width, threads, isa}, log_u, sums);
}

MEGACPT_EXPORT double megacpt_sinkhorn_improve(const int64_t* load, double* log_u, int64_t width) {
  return improve(load, width, log_u);
}

// Iterates until the error is within the tolerance, `most` times at most; returns how often.
MEGACPT_EXPORT int64_t megacpt_sinkhorn(const void* logits, int format, const uint8_t* mask, double* log_u,
                                        double* error, int64_t tokens, int64_t width, double tolerance, int64_t most,
                                        int threads, int isa) {
  std::vector<int64_t> load(width);
  std::vector<float> rounded(width);
  int64_t made = 0;
  for (*error = 0.0; made < most && (made == 0 || *error > tolerance); ++made) {
    std::copy(log_u, log_u + width, rounded.begin());
    softmax_sums({logits, format, mask, tokens, width, threads, isa}, rounded.data(), load.data());
    *error = improve(load.data(), width, log_u);
  }
  return made;
}
}
