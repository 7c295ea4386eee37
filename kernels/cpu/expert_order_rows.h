// Row functions that bring the results of experts back to their tokens, declared for every instruction set they are
// compiled for.
#pragma once

#include "numbers.h"

namespace megacpt {

// Which sorted rows belong to a token, and their weights.
struct Slots {
  const int32_t* inverse;  // [tokens, chosen], -1 for none
  const float* gates;      // [tokens, chosen], or null for ones
  int64_t chosen, hidden;
};

#define MEGACPT_DECLARE_EXPERT_ORDER(isa, T)                                                                      \
  namespace isa {                                                                                                 \
  void combine_rows(const T* rows, const Slots& slots, T* out, int64_t from, int64_t to);                         \
  void combine_gradient_rows(const T* grad, const T* rows, const Slots& slots, T* grad_rows, float* grad_gates,   \
                             int64_t from, int64_t to);                                                           \
  }
#define MEGACPT_DECLARE_EXPERT_ORDERS(isa)     \
  MEGACPT_DECLARE_EXPERT_ORDER(isa, float)     \
  MEGACPT_DECLARE_EXPERT_ORDER(isa, BFloat16)  \
  MEGACPT_DECLARE_EXPERT_ORDER(isa, Float16)

MEGACPT_DECLARE_EXPERT_ORDERS(baseline)
MEGACPT_DECLARE_EXPERT_ORDERS(avx2)
MEGACPT_DECLARE_EXPERT_ORDERS(avx512)

}  // namespace megacpt
