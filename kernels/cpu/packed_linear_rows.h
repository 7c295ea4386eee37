// Row functions of products with packed ternary matrices, declared for every instruction set they are compiled for.
#pragma once

#include "numbers.h"

namespace megacpt {

constexpr int64_t UNIT = 128;            // weights that lie together, see megacpt/ops/packed_matrix.py
constexpr int64_t UNIT_BYTES = UNIT / 4;
constexpr int64_t PIECE = 2 * UNIT;      // weights whose activations share a scale
constexpr int64_t CHUNK = 8;             // tokens whose activations lie together
constexpr int64_t TILE = 4;              // rows of the matrix that are worked on together

struct Packed {
  const uint8_t* codes;  // [rows, blocks, units, UNIT_BYTES]
  const float* scales;   // [rows, blocks]
  int64_t rows, columns, blocks;
  int64_t units, pieces;  // of a block
};

// Activations are held by CHUNK tokens (fewer in the last chunk), and in a chunk as [blocks * pieces, tokens, PIECE], so
// that what is read together lies together. Pieces are filled up with zeros.

// As integers: of a piece, byte b of group g of unit u at 64 g + 32 u + b.
struct Rounded {
  int8_t* values;
  float* scales;  // of each piece
  int32_t* sums;  // of the values of each piece
  int64_t tokens;
};

// As they are: of a piece, lane l of unit u at step s at 16 s + 8 u + l, which is the weight 32 (s % 4) + 4 l + s / 4 of
// its unit.
struct Ordered {
  float* values;
  int64_t tokens;
};

#define MEGACPT_DECLARE_ACTIVATIONS(isa, T)                                                                        \
  namespace isa {                                                                                                  \
  void round_activations(const T* x, const Packed& matrix, const Rounded& out, int64_t from, int64_t to);          \
  void order_activations(const T* x, const Packed& matrix, const Ordered& out, int64_t from, int64_t to);          \
  }

// Products for tiles of rows from `from` to `to`; out: [tokens, rows].
#define MEGACPT_DECLARE_INT8(isa)                                                                                  \
  namespace isa {                                                                                                  \
  void packed_int8_rows(const Packed& matrix, const Rounded& x, float* out, int64_t from, int64_t to);           \
  }
#define MEGACPT_DECLARE_PACKED(isa)            \
  MEGACPT_DECLARE_ACTIVATIONS(isa, float)      \
  MEGACPT_DECLARE_ACTIVATIONS(isa, BFloat16)   \
  MEGACPT_DECLARE_ACTIVATIONS(isa, Float16)    \
  MEGACPT_DECLARE_INT8(isa)                    \
  namespace isa {                              \
  void packed_float_rows(const Packed& matrix, const Ordered& x, float* out, int64_t from, int64_t to); \
  }

MEGACPT_DECLARE_PACKED(baseline)
MEGACPT_DECLARE_PACKED(avx2)
MEGACPT_DECLARE_PACKED(avx512)
MEGACPT_DECLARE_INT8(avx512vnni)

}  // namespace megacpt
