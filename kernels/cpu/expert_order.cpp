// C interface of sorting tokens by expert, and of taking them there and back. Nothing depends on the number of threads:
// the sort is stable, and every row is written by one thread.

#include "expert_order_rows.h"

#include <cstring>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"

namespace {

using namespace megacpt;

enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int64_t PIECE = 8192;  // slots whose experts are counted together

// A counting sort: each piece counts its experts, a scan gives every piece its first place with every expert.
void sort(const int32_t* experts, int64_t slots, int64_t width, int32_t* perm, int32_t* inverse, int64_t* counts,
          int threads) {
  const int64_t pieces = (slots + PIECE - 1) / PIECE, bins = width + 1;  // the last one holds what is dropped
  std::vector<int64_t> places(pieces * bins);
  const auto bin = [&](int64_t slot) { return experts[slot] < 0 || experts[slot] >= width ? width : experts[slot]; };
  const auto each = [&](const auto& work) {
    parallel_over(pieces, PIECE * 4, threads, [&](int64_t from, int64_t to) {
      for (int64_t slot = from * PIECE; slot < std::min(to * PIECE, slots); ++slot)
        work(slot, places[slot / PIECE * bins + bin(slot)]);
    });
  };
  each([](int64_t, int64_t& place) { ++place; });
  int64_t next = 0;
  for (int64_t expert = 0; expert < bins; ++expert) {
    const int64_t first = next;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t count = places[piece * bins + expert];
      places[piece * bins + expert] = next;
      next += count;
    }
    if (expert < width) counts[expert] = next - first;
  }
  each([&](int64_t slot, int64_t& place) {
    inverse[slot] = bin(slot) == width ? -1 : static_cast<int32_t>(place);
    perm[place++] = static_cast<int32_t>(slot);
  });
}

void clear_rows(char* rows, int64_t row_bytes, int64_t from, int64_t to) {
  if (to > from) std::memset(rows + from * row_bytes, 0, (to - from) * row_bytes);
}

template <typename T>
void combine(const void* rows, const Slots& slots, void* out, int64_t tokens, int threads, int isa) {
  parallel_over(tokens, slots.chosen * slots.hidden, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, combine_rows(static_cast<const T*>(rows), slots, static_cast<T*>(out), from, to));
  });
}

template <typename T>
void combine_gradient(const void* grad, const void* rows, const Slots& slots, void* grad_rows, float* grad_gates,
                      int64_t tokens, int threads, int isa) {
  parallel_over(tokens, slots.chosen * slots.hidden * 2, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, combine_gradient_rows(static_cast<const T*>(grad), static_cast<const T*>(rows), slots,
                                              static_cast<T*>(grad_rows), grad_gates, from, to));
  });
}

}  // namespace

extern "C" {

MEGACPT_EXPORT void megacpt_moe_sort(const int32_t* experts, int64_t slots, int64_t width, int32_t* perm,
                                     int32_t* inverse, int64_t* counts, int threads) {
  sort(experts, slots, width, perm, inverse, counts, threads);
}

// Copies each token to the rows of its slots; those behind the `kept` first rows become 0.
MEGACPT_EXPORT void megacpt_gather_tokens(const char* tokens, const int32_t* inverse, char* rows, int64_t count,
                                          int64_t chosen, int64_t row_bytes, int64_t kept, int threads) {
  parallel_over(count, chosen * row_bytes / 4, threads, [&](int64_t from, int64_t to) {
    for (int64_t slot = from * chosen; slot < to * chosen; ++slot)
      if (inverse[slot] >= 0)
        std::memcpy(rows + inverse[slot] * row_bytes, tokens + slot / chosen * row_bytes, row_bytes);
  });
  clear_rows(rows, row_bytes, kept, count * chosen);
}

MEGACPT_EXPORT void megacpt_combine_tokens(const void* rows, int format, const int32_t* inverse, const float* gates,
                                           void* out, int64_t tokens, int64_t chosen, int64_t hidden, int threads,
                                           int isa) {
  const Slots slots{inverse, gates, chosen, hidden};
  if (format == FLOAT32)
    combine<float>(rows, slots, out, tokens, threads, isa);
  else if (format == BFLOAT16)
    combine<BFloat16>(rows, slots, out, tokens, threads, isa);
  else
    combine<Float16>(rows, slots, out, tokens, threads, isa);
}

MEGACPT_EXPORT void megacpt_combine_gradient(const void* grad, const void* rows, int format, const int32_t* inverse,
                                             const float* gates, void* grad_rows, float* grad_gates, int64_t tokens,
                                             int64_t chosen, int64_t hidden, int64_t kept, int threads, int isa) {
  const Slots slots{inverse, gates, chosen, hidden};
  if (format == FLOAT32)
    combine_gradient<float>(grad, rows, slots, grad_rows, grad_gates, tokens, threads, isa);
  else if (format == BFLOAT16)
    combine_gradient<BFloat16>(grad, rows, slots, grad_rows, grad_gates, tokens, threads, isa);
  else
    combine_gradient<Float16>(grad, rows, slots, grad_rows, grad_gates, tokens, threads, isa);
  clear_rows(static_cast<char*>(grad_rows), hidden * (format == FLOAT32 ? 4 : 2), kept, tokens * chosen);
}
}
