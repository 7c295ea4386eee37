// C interface of the product with a 16-bit matrix: its rows over threads.

#include "half_linear_rows.h"

#include "instruction_set.h"
#include "parallel.h"

namespace {

using namespace megacpt;

enum Format { BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int64_t LEAST_ROWS = 16;  // a thread takes so many at once

template <typename T>
void half_linear(const float* x, const T* weight, float* out, int64_t tokens, int64_t rows, int64_t columns,
                 int threads, int isa) {
  const int64_t parts = (rows + LEAST_ROWS - 1) / LEAST_ROWS;
  parallel_over(parts, LEAST_ROWS * columns * tokens / 4, threads, [&](int64_t first, int64_t last) {
    const int64_t from = first * LEAST_ROWS, to = std::min(last * LEAST_ROWS, rows);
    MEGACPT_ON_ISA(isa, half_linear_rows(x, weight, out, tokens, rows, columns, from, to));
  });
}

}  // namespace

// out: [tokens, rows]
extern "C" MEGACPT_EXPORT void megacpt_half_linear(const float* x, const void* weight, int format, float* out,
                                                   int64_t tokens, int64_t rows, int64_t columns, int threads,
                                                   int isa) {
  if (format == BFLOAT16)
    half_linear(x, static_cast<const BFloat16*>(weight), out, tokens, rows, columns, threads, isa);
  else
    half_linear(x, static_cast<const Float16*>(weight), out, tokens, rows, columns, threads, isa);
}
