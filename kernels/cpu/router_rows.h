// Row functions of the mixture-of-experts router, declared for every instruction set they are compiled for.
#pragma once

#include "numbers.h"

namespace megacpt {

constexpr int64_t MOST_EXPERTS = 2048;  // rows are worked on in the stack
constexpr int64_t MOST_CHOSEN = 64;

struct Scoring {
  int64_t experts, chosen;
  int sigmoid, renormalise, bias_on_logits;
  int64_t groups, groups_kept;
  float scale;
};

struct RouterIn {
  const float* bias;     // [experts] or null
  const uint8_t* mask;   // [tokens], 0 for padding, or null
};

// Out, by token.
struct Routes {
  float* gates;      // [tokens, chosen]
  int32_t* experts;  // [tokens, chosen]
  float* lse;        // [tokens]
};

// Out, summed over the tokens in fixed point: addition of integers has no order.
struct Sums {
  int64_t* counts;         // [experts]
  int64_t* probabilities;  // [experts]
  int64_t* z;              // [1]
};

struct RouterGradient {
  const float* lse;         // [tokens]
  const int32_t* experts;   // [tokens, chosen]
  const float* gates;       // [tokens, chosen], the gradient of the gates
  const float* balance;     // [experts], the coefficients of the routing probabilities
  float z;                  // the coefficient of the squared log-sum-exp
};

#define MEGACPT_DECLARE_ROUTER(isa, T)                                                                               \
  namespace isa {                                                                                                    \
  void route_rows(const T* logits, const RouterIn& in, const Scoring& scoring, const Routes& routes, const Sums& sums, \
                  int64_t from, int64_t to);                                                                         \
  void route_gradient_rows(const T* logits, T* grad, const RouterGradient& upstream, const Scoring& scoring,         \
                           int64_t from, int64_t to);                                                                \
  }
#define MEGACPT_DECLARE_ROUTERS(isa)     \
  MEGACPT_DECLARE_ROUTER(isa, float)     \
  MEGACPT_DECLARE_ROUTER(isa, BFloat16)  \
  MEGACPT_DECLARE_ROUTER(isa, Float16)

MEGACPT_DECLARE_ROUTERS(baseline)
MEGACPT_DECLARE_ROUTERS(avx2)
MEGACPT_DECLARE_ROUTERS(avx512)

}  // namespace megacpt
