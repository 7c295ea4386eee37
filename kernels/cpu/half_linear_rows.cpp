// Products of rows of 16-bit floats with float32 activations. Compiled once for every instruction set, so it must not
// use anything from the C++ library (see cross_entropy_rows.cpp).
//
// Sums run in 16 lanes, whatever the register, over the columns in order.

#include "half_linear_rows.h"

#include "intrinsics.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "formats.h"

constexpr int LANES = 16;
constexpr int PARTS = LANES / WIDTH;
constexpr int64_t CACHED_BYTES = 1 << 17;  // of weights, which stay in the cache for the next tokens

inline Floats weights(const BFloat16* from) { return wide(from); }

inline Floats weights(const Float16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  return wide(from);
#endif
}

template <int TOKENS>
struct Sums {
  Floats of[TOKENS][PARTS] = {};
};

template <int ROWS, int TOKENS, typename T>
inline void multiply(const float* x, const T* weight, float* out, int64_t rows, int64_t columns) {
  Sums<TOKENS> sums[ROWS];
  int64_t i = 0;
  for (; i + LANES <= columns; i += LANES)
    MEGACPT_UNROLL
    for (int r = 0; r < ROWS; ++r)
      MEGACPT_UNROLL
      for (int part = 0; part < PARTS; ++part) {
        const T* const from = weight + r * columns + i + part * WIDTH;
        __builtin_prefetch(from + ROWS * columns);  // hardware that fetches ahead stops at the end of a page
        const Floats w = weights(from);
        MEGACPT_UNROLL
        for (int t = 0; t < TOKENS; ++t)
          sums[r].of[t][part] += w * read<Floats>(x + t * columns + i + part * WIDTH);
      }
  MEGACPT_UNROLL
  for (int part = 0; part < PARTS; ++part) {
    const int64_t at = i + part * WIDTH, left = columns - at < WIDTH ? columns - at : WIDTH;
    if (left <= 0) break;
    MEGACPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const Floats w = wide_part(weight + r * columns + at, left, 0.0f);
      MEGACPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) sums[r].of[t][part] += w * wide_part(x + t * columns + at, left, 0.0f);
    }
  }
  MEGACPT_UNROLL
  for (int r = 0; r < ROWS; ++r)
    MEGACPT_UNROLL
    for (int t = 0; t < TOKENS; ++t)
      out[t * rows + r] = join_registers(sums[r].of[t], [](auto a, auto b) { return a + b; });
}

// `x` and `out` are those of the first of TOKENS tokens.
template <int TOKENS, typename T>
inline void multiply_rows(const float* x, const T* weight, float* out, int64_t rows, int64_t columns, int64_t from,
                          int64_t to) {
  constexpr int HELD = (PARTS == 1 ? 16 : 8) / PARTS / TOKENS;  // rows whose sums stay in registers
  constexpr int ROWS = HELD > 4 ? 4 : HELD > 0 ? HELD : 1;
  int64_t row = from;
  for (; row + ROWS <= to; row += ROWS)
    multiply<ROWS, TOKENS>(x, weight + row * columns, out + row, rows, columns);
  for (; row < to; ++row) multiply<1, TOKENS>(x, weight + row * columns, out + row, rows, columns);
}

template <typename T>
inline void multiply_all(const float* x, const T* weight, float* out, int64_t tokens, int64_t rows, int64_t columns,
                         int64_t from, int64_t to) {
  const int64_t fitting = CACHED_BYTES / (columns * static_cast<int64_t>(sizeof(T)));
  const int64_t cached = tokens <= 4 ? to - from : fitting > 4 ? fitting : 4;
  for (int64_t first = from; first < to; first += cached) {
    const int64_t end = first + cached < to ? first + cached : to;
    for (int64_t token = 0, taken; token < tokens; token += taken) {
      const float* const values = x + token * columns;
      float* const results = out + token * rows;
      taken = tokens - token >= 4 ? 4 : tokens - token >= 2 ? 2 : 1;
      if (taken == 4)
        multiply_rows<4>(values, weight, results, rows, columns, first, end);
      else if (taken == 2)
        multiply_rows<2>(values, weight, results, rows, columns, first, end);
      else
        multiply_rows<1>(values, weight, results, rows, columns, first, end);
    }
  }
}

}  // namespace

#define MEGACPT_HALF_LINEAR(T)                                                                                     \
  void half_linear_rows(const float* x, const T* weight, float* out, int64_t tokens, int64_t rows, int64_t columns, \
                        int64_t from, int64_t to) {                                                                \
    multiply_all(x, weight, out, tokens, rows, columns, from, to);                                                 \
  }

MEGACPT_HALF_LINEAR(BFloat16)
MEGACPT_HALF_LINEAR(Float16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
