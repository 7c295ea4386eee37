// Row functions of Sinkhorn's algorithm, declared for every instruction set they are compiled for.
#pragma once

#include "numbers.h"

namespace megacpt {

struct Balancing {
  const float* log_u;   // [experts], padded with zeros to 16
  const uint8_t* mask;  // [tokens], 0 for padding, or null
  int64_t experts;      // 4096 at most: a block of rows is worked on in the stack
};

#define MEGACPT_DECLARE_SINKHORN(isa, T)                                                                           \
  namespace isa {                                                                                                  \
  void softmax_sum_rows(const T* logits, const Balancing& in, int64_t* sums, int64_t from, int64_t to);            \
  }
#define MEGACPT_DECLARE_SINKHORNS(isa)     \
  MEGACPT_DECLARE_SINKHORN(isa, float)     \
  MEGACPT_DECLARE_SINKHORN(isa, BFloat16)  \
  MEGACPT_DECLARE_SINKHORN(isa, Float16)

MEGACPT_DECLARE_SINKHORNS(baseline)
MEGACPT_DECLARE_SINKHORNS(avx2)
MEGACPT_DECLARE_SINKHORNS(avx512)

}  // namespace megacpt
