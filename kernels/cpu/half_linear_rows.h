// Row functions of products with 16-bit matrices, declared for every instruction set they are compiled for.
#pragma once

#include "numbers.h"

namespace megacpt {

// Products of float32 x [tokens, columns] with the rows from `from` to `to` of a matrix [rows, columns]; out: [tokens,
// rows].
#define MEGACPT_DECLARE_HALF(isa, T)                                                                               \
  namespace isa {                                                                                                  \
  void half_linear_rows(const float* x, const T* weight, float* out, int64_t tokens, int64_t rows, int64_t columns, \
                        int64_t from, int64_t to);                                                                 \
  }
#define MEGACPT_DECLARE_HALVES(isa)      \
  MEGACPT_DECLARE_HALF(isa, BFloat16)    \
  MEGACPT_DECLARE_HALF(isa, Float16)

MEGACPT_DECLARE_HALVES(baseline)
MEGACPT_DECLARE_HALVES(avx2)
MEGACPT_DECLARE_HALVES(avx512)

}  // namespace megacpt
