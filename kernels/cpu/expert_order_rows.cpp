// The weighted sum over the experts of a token, and its gradient. Sums are float32, over a token's slots in order: no
// thread adds to what another one writes. Compiled once for every instruction set, so it must not use anything from the
// C++ library (see cross_entropy_rows.cpp).

#include "expert_order_rows.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "formats.h"

constexpr int LANES = 16;  // of a dot product, whatever the register
constexpr int PARTS = LANES / WIDTH;

inline float gate(const Slots& slots, int64_t slot) { return slots.gates == nullptr ? 1.0f : slots.gates[slot]; }

// The sum of COUNT registers from column `at` on.
template <int COUNT, typename T>
inline void combine(const T* rows, const Slots& slots, int64_t token, int64_t at, Floats (&sum)[COUNT]) {
  for (int64_t slot = token * slots.chosen; slot < (token + 1) * slots.chosen; ++slot) {
    if (slots.inverse[slot] < 0) continue;
    const T* row = rows + slots.inverse[slot] * slots.hidden + at;
    const Floats weight = all(gate(slots, slot));
    for (int n = 0; n < COUNT; ++n) sum[n] += weight * wide(row + n * WIDTH);
  }
}

template <typename T>
inline void combine_token(const T* rows, const Slots& slots, T* out, int64_t token) {
  constexpr int COUNT = 4;
  int64_t at = 0;
  for (; at + COUNT * WIDTH <= slots.hidden; at += COUNT * WIDTH) {
    Floats sum[COUNT] = {};
    combine(rows, slots, token, at, sum);
    for (int n = 0; n < COUNT; ++n) write(sum[n], out + at + n * WIDTH);
  }
  for (; at < slots.hidden; at += WIDTH) {
    const int64_t left = slots.hidden - at < WIDTH ? slots.hidden - at : WIDTH;
    Floats sum = {};
    for (int64_t slot = token * slots.chosen; slot < (token + 1) * slots.chosen; ++slot)
      if (slots.inverse[slot] >= 0)
        sum += gate(slots, slot) * wide_part(rows + slots.inverse[slot] * slots.hidden + at, left, 0.0f);
    write_part(sum, out + at, left);
  }
}

// Writes gate * grad, and returns the dot product of grad and the row.
template <typename T>
inline float combine_gradient(const T* grad, const T* row, float weight, T* grad_row, int64_t hidden) {
  Floats dot[PARTS] = {};
  int64_t at = 0;
  for (; at + LANES <= hidden; at += LANES)
    for (int part = 0; part < PARTS; ++part) {
      const int64_t i = at + part * WIDTH;
      const Floats up = wide(grad + i);
      dot[part] += up * wide(row + i);
      write(weight * up, grad_row + i);
    }
  for (int part = 0; part < PARTS && at < hidden; ++part, at += WIDTH) {
    const int64_t left = hidden - at < WIDTH ? hidden - at : WIDTH;
    const Floats up = wide_part(grad + at, left, 0.0f);
    dot[part] += up * wide_part(row + at, left, 0.0f);
    write_part(weight * up, grad_row + at, left);
  }
  return join_registers(dot, [](auto a, auto b) { return a + b; });
}

}  // namespace

#define MEGACPT_EXPERT_ORDER_ROWS(T)                                                                              \
  void combine_rows(const T* rows, const Slots& slots, T* out, int64_t from, int64_t to) {                        \
    for (int64_t token = from; token < to; ++token)                                                               \
      combine_token(rows, slots, out + token * slots.hidden, token);                                              \
  }                                                                                                               \
  void combine_gradient_rows(const T* grad, const T* rows, const Slots& slots, T* grad_rows, float* grad_gates,   \
                             int64_t from, int64_t to) {                                                          \
    for (int64_t slot = from * slots.chosen; slot < to * slots.chosen; ++slot) {                                  \
      const int64_t row = slots.inverse[slot] * slots.hidden;                                                     \
      const T* up = grad + slot / slots.chosen * slots.hidden;                                                    \
      grad_gates[slot] =                                                                                          \
          row < 0 ? 0.0f : combine_gradient(up, rows + row, gate(slots, slot), grad_rows + row, slots.hidden);    \
    }                                                                                                             \
  }

MEGACPT_EXPERT_ORDER_ROWS(float)
MEGACPT_EXPERT_ORDER_ROWS(BFloat16)
MEGACPT_EXPERT_ORDER_ROWS(Float16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
