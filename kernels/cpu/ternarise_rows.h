// Row functions of ternary quantisation, declared for every instruction set they are compiled for.
#pragma once

#include "numbers.h"

namespace megacpt {

// One of a list of weights [batch, rows, width] with scales [batch, row_blocks, column_blocks], as in
// megacpt/ops/ternarise_reference.py. The same in memory as the structure in megacpt/ops/ternarise_cpu.py.
struct TernaryMatrix {
  const void* weight;
  void* out;            // [batch, rows, width], or null
  const float* scales;  // [batch, row_blocks, column_blocks]
  uint8_t* packed;      // [batch, rows, (width + 3) / 4], or null where `out` is not
  double* row_sums;     // [batch, rows, column_blocks], for use by the kernel
  double* sums;         // [batch, row_blocks, column_blocks]
  int64_t batch;
  int32_t rows, width, halves, row_blocks, column_blocks;
  int32_t aligned;  // for use by the CUDA kernels
};

constexpr int SUM_LANES = 128;  // in which sums are made

struct TernaryCounts {
  int64_t zeros, flips;
};

#define MEGACPT_DECLARE_ABS_SUMS(isa, T) \
  namespace isa {                        \
  void abs_sum_rows(const T* weight, const TernaryMatrix& matrix, int64_t from, int64_t to);  \
  }
// `codes`: room for `width` bytes and 64 more.
#define MEGACPT_DECLARE_TERNARISE(isa, T, Out)                                                                     \
  namespace isa {                                                                                                  \
  void ternarise_rows(const T* weight, Out* out, const TernaryMatrix& matrix, uint8_t* codes, int64_t from,        \
                      int64_t to, TernaryCounts& counts);                                                          \
  }
// `codes` as above. With `bytes`, `packed` are codes in float8 e4m3, [batch, rows, width].
#define MEGACPT_DECLARE_UNPACK(isa, Out)                                                                           \
  namespace isa {                                                                                                  \
  void unpack_rows(Out* out, const TernaryMatrix& matrix, bool bytes, uint8_t* codes, int64_t from, int64_t to);   \
  }
#define MEGACPT_DECLARE_TERNARY(isa)                      \
  MEGACPT_DECLARE_ABS_SUMS(isa, float)                    \
  MEGACPT_DECLARE_ABS_SUMS(isa, BFloat16)                 \
  MEGACPT_DECLARE_ABS_SUMS(isa, Float16)                  \
  MEGACPT_DECLARE_TERNARISE(isa, float, float)            \
  MEGACPT_DECLARE_TERNARISE(isa, float, BFloat16)         \
  MEGACPT_DECLARE_TERNARISE(isa, float, Float16)          \
  MEGACPT_DECLARE_TERNARISE(isa, BFloat16, BFloat16)      \
  MEGACPT_DECLARE_TERNARISE(isa, Float16, Float16)        \
  MEGACPT_DECLARE_UNPACK(isa, float)                      \
  MEGACPT_DECLARE_UNPACK(isa, BFloat16)                   \
  MEGACPT_DECLARE_UNPACK(isa, Float16)

MEGACPT_DECLARE_TERNARY(baseline)
MEGACPT_DECLARE_TERNARY(avx2)
MEGACPT_DECLARE_TERNARY(avx512)

}  // namespace megacpt
