// C interface of the vocabulary-parallel cross entropy: threads over rows, and the row functions for this processor.
// Plain pointers and no torch headers, so that one build serves every version of torch and of Python.

#include "cross_entropy_rows.h"
#include "instruction_set.h"
#include "parallel.h"

namespace {

using namespace megacpt;

template <typename T>
void partials(const T* logits, const int64_t* target, const Partials& out, int64_t rows, const Shape& shape,
              int threads, int isa) {
  parallel_over(rows, shape.vocab, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, partials_rows(logits, out, target, shape, from, to));
  });
}

template <typename T>
void gradient(const T* logits, T* grad, const int64_t* target, const Normalizer& norm, int64_t rows,
              const Shape& shape, int threads, int isa) {
  parallel_over(rows, shape.vocab, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, gradient_rows(logits, grad, norm, target, shape, from, to));
  });
}

}  // namespace

extern "C" {

MEGACPT_EXPORT void megacpt_cross_entropy_partials(const void* logits, int is_bfloat16, const int64_t* target, float* row_max,
                                    float* sum_exp, float* target_logit, int64_t rows, int64_t vocab,
                                    int64_t vocab_start, int threads, int isa) {
  const Partials out{row_max, sum_exp, target_logit};
  const Shape shape{vocab, vocab_start};
  if (is_bfloat16)
    partials(static_cast<const BFloat16*>(logits), target, out, rows, shape, threads, isa);
  else
    partials(static_cast<const float*>(logits), target, out, rows, shape, threads, isa);
}

// `grad` may be `logits`: every element is read before it is written.
MEGACPT_EXPORT void megacpt_cross_entropy_gradient(const void* logits, void* grad, int is_bfloat16, const int64_t* target,
                                    const float* row_max, const float* sum_exp, const float* grad_loss, int64_t rows,
                                    int64_t vocab, int64_t vocab_start, int threads, int isa) {
  const Normalizer norm{row_max, sum_exp, grad_loss};
  const Shape shape{vocab, vocab_start};
  if (is_bfloat16)
    gradient(static_cast<const BFloat16*>(logits), static_cast<BFloat16*>(grad), target, norm, rows, shape, threads,
             isa);
  else
    gradient(static_cast<const float*>(logits), static_cast<float*>(grad), target, norm, rows, shape, threads, isa);
}
}
