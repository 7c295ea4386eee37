// C interface of the product with a packed ternary matrix: activations brought into order, then rows over threads.

#include "packed_linear_rows.h"

#include <memory>
#include <new>

#include "instruction_set.h"
#include "parallel.h"

namespace {

using namespace megacpt;

enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int64_t TOKENS_AT_ONCE = 512;    // whose activations are held in order
constexpr int64_t PRODUCTS_AS_ELEMENT = 8;  // take about as long as what parallel_over counts

constexpr std::align_val_t LINE{64};  // of the cache: a register that lies across two takes twice as long to read

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, LINE); }
};

template <typename T>
using Buffer = std::unique_ptr<T, Release>;

template <typename T>
Buffer<T> uninitialised(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new(count * sizeof(T), LINE)));
}

template <typename Rows>
void over_tiles(const Packed& matrix, int64_t tokens, int threads, const Rows& rows) {
  const int64_t weight = TILE * matrix.columns * tokens / PRODUCTS_AS_ELEMENT;
  parallel_over((matrix.rows + TILE - 1) / TILE, weight, threads, rows);
}

template <typename T>
void with_int8(const T* x, const Packed& matrix, float* out, int64_t tokens, int threads, int isa) {
  const int64_t pieces = tokens * matrix.blocks * matrix.pieces;
  const auto values = uninitialised<int8_t>(pieces * PIECE);
  const auto scales = uninitialised<float>(pieces);
  const auto sums = uninitialised<int32_t>(pieces);
  const Rounded rounded{values.get(), scales.get(), sums.get(), tokens};
  parallel_over(tokens, matrix.columns, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, round_activations(x, matrix, rounded, from, to));
  });
  over_tiles(matrix, tokens, threads, [&](int64_t from, int64_t to) {
#if defined(__x86_64__)
    if (isa == ISA_AVX512VNNI) return avx512vnni::packed_int8_rows(matrix, rounded, out, from, to);
#endif
    MEGACPT_ON_ISA(isa, packed_int8_rows(matrix, rounded, out, from, to));
  });
}

template <typename T>
void with_float(const T* x, const Packed& matrix, float* out, int64_t tokens, int threads, int isa) {
  const auto values = uninitialised<float>(tokens * matrix.blocks * matrix.pieces * PIECE);
  const Ordered ordered{values.get(), tokens};
  parallel_over(tokens, matrix.columns, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, order_activations(x, matrix, ordered, from, to));
  });
  over_tiles(matrix, tokens, threads, [&](int64_t from, int64_t to) {
    MEGACPT_ON_ISA(isa, packed_float_rows(matrix, ordered, out, from, to));
  });
}

template <typename T>
void packed_linear(const void* x, bool int8, const Packed& matrix, float* out, int64_t tokens, int threads, int isa) {
  for (int64_t first = 0; first < tokens; first += TOKENS_AT_ONCE) {
    const int64_t count = std::min(TOKENS_AT_ONCE, tokens - first);
    const T* const from = static_cast<const T*>(x) + first * matrix.columns;
    (int8 ? with_int8<T> : with_float<T>)(from, matrix, out + first * matrix.rows, count, threads, isa);
  }
}

}  // namespace

extern "C" {

int megacpt_instruction_set();

// The best instruction set that these kernels have for this processor.
MEGACPT_EXPORT int megacpt_packed_instruction_set() {
  const int best = megacpt_instruction_set();
#if defined(__x86_64__)
  if (best == ISA_AVX512 && __builtin_cpu_supports("avx512vnni")) return ISA_AVX512VNNI;
#endif
  return best;
}

// out: [tokens, rows] float32
MEGACPT_EXPORT void megacpt_packed_linear(const void* x, int format, int int8, const uint8_t* codes,
                                          const float* scales, float* out, int64_t tokens, int64_t rows,
                                          int64_t columns, int64_t blocks, int threads, int isa) {
  const int64_t width = columns / blocks;
  const Packed matrix{codes,  scales, rows, columns, blocks, (width + UNIT - 1) / UNIT, (width + PIECE - 1) / PIECE};
  if (format == FLOAT32)
    packed_linear<float>(x, int8 != 0, matrix, out, tokens, threads, isa);
  else if (format == BFLOAT16)
    packed_linear<BFloat16>(x, int8 != 0, matrix, out, tokens, threads, isa);
  else
    packed_linear<Float16>(x, int8 != 0, matrix, out, tokens, threads, isa);
}
}
