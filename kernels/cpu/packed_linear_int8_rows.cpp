// Products of packed ternary rows with activations of 8 bits. Compiled once for every instruction set, so it must not
// use anything from the C++ library (see cross_entropy_rows.cpp).
//
// Codes are stored as 0..2, unsigned as the instructions want one side to be; the sum of the activations is subtracted.
// All within a piece is exact, so instruction sets may add in what order they like; the sums over pieces and column
// blocks run in order, in float32.

#include "packed_linear_rows.h"

#include "intrinsics.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

constexpr int64_t CACHED_TILES = 16;  // whose weights stay in the cache for the next tokens

typedef float FourFloats __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

// For each instruction set: `Partial`, a sum in pieces; `Weights<UNITS>`, one piece of a row, unpacked, and its product
// with activations; `joined`, the sums of four of them.
#if defined(__AVX512F__)

typedef __m256i Partial;

template <int UNITS>
struct Weights {
  __m512i part[4];

  explicit Weights(const uint8_t* from) {
    const __m512i packed = UNITS == 2 ? _mm512_loadu_si512(from)
                                      : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)from));
    const __m512i mask = _mm512_set1_epi8(3);
    part[0] = _mm512_and_si512(packed, mask);
    part[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask);
    part[2] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    part[3] = _mm512_and_si512(_mm512_srli_epi16(packed, 6), mask);
  }

  Partial times(const int8_t* x) const {
    const auto at = [x](int group) { return _mm512_loadu_si512(x + 64 * group); };
#if defined(__AVX512VNNI__)
    const __m512i none = _mm512_setzero_si512();
    const __m512i even = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, part[0], at(0)), part[2], at(2));
    const __m512i odd = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, part[1], at(1)), part[3], at(3));
    const __m512i sum = _mm512_add_epi32(even, odd);
#else
    const auto product = [&](int group) { return _mm512_maddubs_epi16(part[group], at(group)); };
    const __m512i pairs = _mm512_add_epi16(_mm512_add_epi16(product(0), product(1)),
                                           _mm512_add_epi16(product(2), product(3)));
    const __m512i sum = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#endif
    return _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
  }
};

#elif defined(__AVX2__)

typedef __m256i Partial;

template <int UNITS>
struct Weights {
  __m256i part[4 * UNITS];

  explicit Weights(const uint8_t* from) {
    const __m256i mask = _mm256_set1_epi8(3);
    MEGACPT_UNROLL
    for (int unit = 0; unit < UNITS; ++unit) {
      const __m256i packed = _mm256_loadu_si256((const __m256i*)(from + unit * UNIT_BYTES));
      part[4 * unit] = _mm256_and_si256(packed, mask);
      part[4 * unit + 1] = _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask);
      part[4 * unit + 2] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
      part[4 * unit + 3] = _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask);
    }
  }

  Partial times(const int8_t* x) const {  // eight products of at most 2 * 2 * 127 fit 16 bits
    __m256i pairs = _mm256_setzero_si256();
    MEGACPT_UNROLL
    for (int unit = 0; unit < UNITS; ++unit)
      MEGACPT_UNROLL
      for (int group = 0; group < 4; ++group) {
        const __m256i values = _mm256_loadu_si256((const __m256i*)(x + 64 * group + 32 * unit));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(part[4 * unit + group], values));
      }
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};

#else

typedef int32_t Partial;

template <int UNITS>
struct Weights {
  int16_t part[PIECE];

  explicit Weights(const uint8_t* from) {
    MEGACPT_UNROLL
    for (int unit = 0; unit < UNITS; ++unit)
      MEGACPT_UNROLL
      for (int group = 0; group < 4; ++group)
        for (int byte = 0; byte < 32; ++byte)
          part[64 * group + 32 * unit + byte] = from[unit * UNIT_BYTES + byte] >> (2 * group) & 3;
  }

  Partial times(const int8_t* x) const {
    int32_t sum = 0;
    MEGACPT_UNROLL
    for (int group = 0; group < 4; ++group)
      for (int byte = 0; byte < 32 * UNITS; ++byte) {
        const int16_t value = x[64 * group + byte];
        sum += part[64 * group + byte] * value;
      }
    return sum;
  }
};

#endif

#if defined(__AVX2__)
inline FourInts joined(Partial a, Partial b, Partial c, Partial d) {
  const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return (FourInts)_mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}
#else
inline FourInts joined(Partial a, Partial b, Partial c, Partial d) { return FourInts{a, b, c, d}; }
#endif

// A tile of rows and the activations that it meets, both of the present piece.
struct Work {
  const uint8_t* codes[TILE];
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  int64_t chunk;  // tokens that are held together
  int64_t ahead;  // bytes to the next tile: hardware that fetches ahead stops at the end of a page
};

template <int UNITS, int TOKENS>
inline void add_piece(Work& work, FourFloats (&totals)[TOKENS]) {
  Partial sums[TILE][TOKENS];
  MEGACPT_UNROLL
  for (int row = 0; row < TILE; ++row) {
    __builtin_prefetch(work.codes[row] + work.ahead);
    const Weights<UNITS> weights(work.codes[row]);
    MEGACPT_UNROLL
    for (int t = 0; t < TOKENS; ++t) sums[row][t] = weights.times(work.values + t * PIECE);
    work.codes[row] += UNITS * UNIT_BYTES;
  }
  MEGACPT_UNROLL
  for (int t = 0; t < TOKENS; ++t) {
    const FourInts exact = joined(sums[0][t], sums[1][t], sums[2][t], sums[3][t]) - work.sums[t];
    totals[t] += __builtin_convertvector(exact, FourFloats) * work.scales[t];
  }
  work.values += work.chunk * PIECE;
  work.scales += work.chunk;
  work.sums += work.chunk;
}

// The products of a tile of rows, of which `count` exist, with TOKENS tokens.
template <int TOKENS>
inline void multiply(const Packed& matrix, Work work, int64_t first, int64_t count, float* out) {
  int64_t rows[TILE];
  for (int64_t r = 0; r < TILE; ++r) {
    rows[r] = first + (r < count ? r : 0);
    work.codes[r] = matrix.codes + rows[r] * matrix.blocks * matrix.units * UNIT_BYTES;
  }
  FourFloats results[TOKENS] = {};
  for (int64_t block = 0; block < matrix.blocks; ++block) {
    FourFloats totals[TOKENS] = {};
    int64_t units = matrix.units;
    for (; units > 1; units -= 2) add_piece<2>(work, totals);
    if (units == 1) add_piece<1>(work, totals);
    FourFloats scales;
    for (int64_t r = 0; r < TILE; ++r) scales[r] = matrix.scales[rows[r] * matrix.blocks + block];
    MEGACPT_UNROLL
    for (int t = 0; t < TOKENS; ++t) results[t] += totals[t] * scales;
  }
  MEGACPT_UNROLL
  for (int t = 0; t < TOKENS; ++t)
    for (int64_t r = 0; r < count; ++r) out[t * matrix.rows + first + r] = results[t][r];
}

template <int TOKENS>
inline void multiply_tiles(const Packed& matrix, const Work& work, float* out, int64_t from, int64_t to) {
  for (int64_t tile = from; tile < to; ++tile) {
    const int64_t first = tile * TILE, rest = matrix.rows - first;
    multiply<TOKENS>(matrix, work, first, rest < TILE ? rest : TILE, out);
  }
}

}  // namespace

void packed_int8_rows(const Packed& matrix, const Rounded& x, float* out, int64_t from, int64_t to) {
  for (int64_t first = from; first < to; first += CACHED_TILES)
    for (int64_t token = 0, taken; token < x.tokens; token += taken) {
      const int64_t last = first + CACHED_TILES < to ? first + CACHED_TILES : to;
      const int64_t begin = token / CHUNK * CHUNK, held = x.tokens - begin < CHUNK ? x.tokens - begin : CHUNK;
      const int64_t place = begin * matrix.blocks * matrix.pieces + token - begin, left = begin + held - token;
      const Work work{{}, x.values + place * PIECE, x.scales + place, x.sums + place, held,
                      TILE * matrix.blocks * matrix.units * UNIT_BYTES};
      float* const results = out + token * matrix.rows;
      taken = left == CHUNK ? CHUNK : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (taken == CHUNK)
        multiply_tiles<CHUNK>(matrix, work, results, first, last);
      else if (taken == 4)
        multiply_tiles<4>(matrix, work, results, first, last);
      else if (taken == 2)
        multiply_tiles<2>(matrix, work, results, first, last);
      else
        multiply_tiles<1>(matrix, work, results, first, last);
    }
}

}  // namespace MEGACPT_ISA
}  // namespace megacpt
