// Products of packed ternary rows with float32 activations. Compiled once for every instruction set, so it must not use
// anything from the C++ library (see cross_entropy_rows.cpp).
//
// A register of 32-bit lanes holds sixteen codes a lane; shifted by two bits at each step, the lowest two choose -1, 0
// or 1. Products with these are exact, so fused and separate multiplications give the same bits. Sums run in 16 lanes,
// whatever the register, over the steps of a column block; the lanes are joined at the end of the row.

#include "packed_linear_rows.h"

#include "intrinsics.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "formats.h"

constexpr int LANES = 16;
constexpr int PARTS = LANES / WIDTH;
constexpr int STEPS = 16;
constexpr int REGISTERS = PARTS == 1 ? 16 : 8;  // for sums
constexpr int64_t CACHED_TILES = 16;  // whose weights stay in the cache for the next tokens

// Part `part` of the codes of a piece of UNITS units.
template <int UNITS>
inline Bits packed_codes(const uint8_t* from, int part) {
#if defined(__AVX512F__)
  if constexpr (UNITS == 1) return (Bits)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)from));
#endif
  return read<Bits>(from + part * WIDTH * sizeof(uint32_t));
}

// What the lowest two bits of each lane stand for.
inline Floats signs(Bits codes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutevar_ps(_mm512_setr4_ps(-1.0f, 0.0f, 1.0f, 0.0f), (__m512i)codes);
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar_ps(_mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0), (__m256i)codes);
#else
  return __builtin_convertvector((Ints)(codes & 3u) - 1, Floats);
#endif
}

inline Floats added(Floats sign, Floats x, Floats sum) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)sign, (__m512)x, (__m512)sum);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)sign, (__m256)x, (__m256)sum);
#else
  return sum + sign * x;
#endif
}

template <int ROWS, int TOKENS>
struct Sums {
  Floats of[PARTS][ROWS][TOKENS];
};

// Adds a piece; `x` is that of the first token, `ahead` the bytes to the rows that come next: hardware that fetches
// ahead stops at the end of a page.
template <int UNITS, int ROWS, int TOKENS>
inline void add_piece(const uint8_t* const (&rows)[ROWS], int64_t ahead, const float* x, Sums<ROWS, TOKENS>& sums) {
  constexpr int USED = UNITS == 2 || PARTS == 1 ? PARTS : PARTS / 2;
  MEGACPT_UNROLL
  for (int part = 0; part < USED; ++part) {
    Bits codes[ROWS];
    Floats held[ROWS][TOKENS];  // in registers over the steps
    MEGACPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      codes[r] = packed_codes<UNITS>(rows[r], part);
      if (part == 0) __builtin_prefetch(rows[r] + ahead);
      MEGACPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) held[r][t] = sums.of[part][r][t];
    }
    for (int step = 0; step < STEPS; ++step) {
      Floats values[TOKENS];
      MEGACPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) values[t] = read<Floats>(x + t * PIECE + step * LANES + part * WIDTH);
      MEGACPT_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const Floats sign = signs(codes[r]);
        codes[r] >>= 2;
        MEGACPT_UNROLL
        for (int t = 0; t < TOKENS; ++t) held[r][t] = added(sign, values[t], held[r][t]);
      }
    }
    MEGACPT_UNROLL
    for (int r = 0; r < ROWS; ++r)
      MEGACPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) sums.of[part][r][t] = held[r][t];
  }
}

// The products of ROWS rows with TOKENS tokens; `x` and `out` are those of the first one, of `chunk` held together.
template <int ROWS, int TOKENS>
inline void multiply(const Packed& matrix, const float* x, int64_t chunk, float* out, const int64_t (&rows)[ROWS]) {
  const int64_t row_bytes = matrix.blocks * matrix.units * UNIT_BYTES;
  const uint8_t* codes[ROWS];
  MEGACPT_UNROLL
  for (int r = 0; r < ROWS; ++r) codes[r] = matrix.codes + rows[r] * row_bytes;
  Sums<ROWS, TOKENS> results = {};
  for (int64_t block = 0; block < matrix.blocks; ++block) {
    Sums<ROWS, TOKENS> sums = {};
    int64_t units = matrix.units;
    for (; units > 1; units -= 2, x += chunk * PIECE) {
      add_piece<2>(codes, ROWS * row_bytes, x, sums);
      for (const uint8_t*& row : codes) row += 2 * UNIT_BYTES;
    }
    if (units == 1) {
      add_piece<1>(codes, ROWS * row_bytes, x, sums);
      for (const uint8_t*& row : codes) row += UNIT_BYTES;
      x += chunk * PIECE;
    }
    MEGACPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const Floats scale = all(matrix.scales[rows[r] * matrix.blocks + block]);
      MEGACPT_UNROLL
      for (int t = 0; t < TOKENS; ++t)
        MEGACPT_UNROLL
        for (int part = 0; part < PARTS; ++part) results.of[part][r][t] += sums.of[part][r][t] * scale;
    }
  }
  MEGACPT_UNROLL
  for (int r = 0; r < ROWS; ++r)
    MEGACPT_UNROLL
    for (int t = 0; t < TOKENS; ++t) {
      Floats parts[PARTS];
      MEGACPT_UNROLL
      for (int part = 0; part < PARTS; ++part) parts[part] = results.of[part][r][t];
      out[t * matrix.rows + rows[r]] = join_registers(parts, [](auto a, auto b) { return a + b; });
    }
}

// All rows of a tile with TOKENS tokens, as many rows at a time as registers allow.
template <int TOKENS>
inline void multiply_tile(const Packed& matrix, const float* x, int64_t chunk, float* out, int64_t tile) {
  constexpr int HELD = REGISTERS / TOKENS;  // rows whose sums stay in registers
  constexpr int ROWS = HELD > TILE ? TILE : HELD;
  for (int64_t first = tile * TILE; first < (tile + 1) * TILE && first < matrix.rows; first += ROWS) {
    int64_t rows[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) rows[r] = first + r < matrix.rows ? first + r : first;
    multiply<ROWS, TOKENS>(matrix, x, chunk, out, rows);
  }
}

}  // namespace

void packed_float_rows(const Packed& matrix, const Ordered& x, float* out, int64_t from, int64_t to) {
  for (int64_t first = from; first < to; first += CACHED_TILES)
    for (int64_t token = 0, taken; token < x.tokens; token += taken) {
      const int64_t last = first + CACHED_TILES < to ? first + CACHED_TILES : to;
      const int64_t begin = token / CHUNK * CHUNK, held = x.tokens - begin < CHUNK ? x.tokens - begin : CHUNK;
      const int64_t place = begin * matrix.blocks * matrix.pieces + token - begin, left = begin + held - token;
      const float* const values = x.values + place * PIECE;
      float* const results = out + token * matrix.rows;
      taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      for (int64_t tile = first; tile < last; ++tile) {
        if (taken == 4)
          multiply_tile<4>(matrix, values, held, results, tile);
        else if (taken == 2)
          multiply_tile<2>(matrix, values, held, results, tile);
        else
          multiply_tile<1>(matrix, values, held, results, tile);
      }
    }
}

}  // namespace MEGACPT_ISA
}  // namespace megacpt
