// Row functions of the vocabulary-parallel cross entropy, declared for every instruction set they are compiled for.
#pragma once

#include "numbers.h"

namespace megacpt {

struct Shape {
  int64_t vocab;        // columns of this shard
  int64_t vocab_start;  // global id of its first column
};

// Out, one float a row: the maximum, the sum of exp(logit - maximum), and the target's logit (0 if in another shard).
struct Partials {
  float* row_max;
  float* sum_exp;
  float* target_logit;
};

// In, one float a row, over all shards: the maximum, the sum of exp(logit - maximum), and the gradient of the loss.
struct Normalizer {
  const float* row_max;
  const float* sum_exp;
  const float* grad_loss;
};

#define MEGACPT_DECLARE(isa, T)                                                                                    \
  namespace isa {                                                                                                  \
  void partials_rows(const T* logits, const Partials& out, const int64_t* target, const Shape& shape,              \
                     int64_t from, int64_t to);                                                                    \
  void gradient_rows(const T* logits, T* grad, const Normalizer& norm, const int64_t* target, const Shape& shape,  \
                     int64_t from, int64_t to);                                                                    \
  }

MEGACPT_DECLARE(baseline, float)
MEGACPT_DECLARE(baseline, BFloat16)
MEGACPT_DECLARE(avx2, float)
MEGACPT_DECLARE(avx2, BFloat16)
MEGACPT_DECLARE(avx512, float)
MEGACPT_DECLARE(avx512, BFloat16)

}  // namespace megacpt
