// Activations in the order in which the products with packed matrices read them, as they are or rounded to 8 bits.
// Compiled once for every instruction set, so it must not use anything from the C++ library (see
// cross_entropy_rows.cpp).

#include "packed_linear_rows.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "formats.h"

typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

constexpr float SMALLEST = 7.888609052210118e-31f;  // 2^-100: a piece below counts as zeros
constexpr float LARGEST = 127.0f;
constexpr int32_t NOT_FINITE = 0x7f800000;  // the bits of infinity; those of NaN are larger

// Copies a piece to float32 and fills it up with zeros.
template <typename T>
inline void load(const T* from, int64_t count, float* piece) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) write(wide(from + i), piece + i);
  for (; i < PIECE; i += WIDTH) write(wide_part(from + i, count - i, 0.0f), piece + i);
}

// The bits of the largest magnitude: their order is that of the numbers, with NaN above infinity.
inline int32_t largest(const float* piece) {
  Ints most = {};
  for (int64_t i = 0; i < PIECE; i += WIDTH) {
    const Ints bits = read<Ints>(piece + i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t top = 0;
  for (int lane = 0; lane < WIDTH; ++lane) top = most[lane] > top ? most[lane] : top;
  return top;
}

inline void round_piece(const float* piece, int8_t* values, float* scale, int32_t* sum) {
  const int32_t top = largest(piece);
  float magnitude;
  __builtin_memcpy(&magnitude, &top, sizeof magnitude);
  const bool finite = top < NOT_FINITE, empty = !finite || magnitude < SMALLEST;
  *scale = !finite ? __builtin_nanf("") : empty ? 0.0f : magnitude / LARGEST;
  *sum = 0;
  if (empty) {
    __builtin_memset(values, 0, PIECE);
    return;
  }
  const Floats factor = all(LARGEST / magnitude), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds
  Ints total = {};
  for (int64_t i = 0; i < PIECE; i += WIDTH) {
    const Ints rounded = (Ints)(read<Floats>(piece + i) * factor + magic) - (Ints)magic;
    const Bytes narrow = __builtin_convertvector(rounded, Bytes);
    __builtin_memcpy(values + 64 * (i % UNIT / 32) + 32 * (i / UNIT) + i % 32, &narrow, sizeof narrow);
    total += rounded;
  }
  for (int lane = 0; lane < WIDTH; ++lane) *sum += total[lane];
}

inline void order_piece(const float* piece, float* out) {
  for (int unit = 0; unit < 2; ++unit)
    for (int group = 0; group < 4; ++group)
      for (int j = 0; j < 4; ++j)
        for (int lane = 0; lane < 8; ++lane)
          out[16 * (4 * j + group) + 8 * unit + lane] = piece[UNIT * unit + 32 * group + 4 * lane + j];
}

// Calls work(piece, place) for all pieces of a token, `place` counting pieces in the order in which they are held.
template <typename T, typename Work>
inline void each_piece(const T* x, const Packed& matrix, int64_t tokens, int64_t token, const Work& work) {
  const int64_t width = matrix.columns / matrix.blocks, first = token / CHUNK * CHUNK;
  const int64_t count = tokens - first < CHUNK ? tokens - first : CHUNK;
  int64_t place = first * matrix.blocks * matrix.pieces + token - first;
  alignas(64) float piece[PIECE];
  for (int64_t block = 0; block < matrix.blocks; ++block)
    for (int64_t p = 0; p < matrix.pieces; ++p, place += count) {
      const int64_t left = width - p * PIECE;
      load(x + token * matrix.columns + block * width + p * PIECE, left < PIECE ? left : PIECE, piece);
      work(piece, place);
    }
}

}  // namespace

#define MEGACPT_ACTIVATIONS(T)                                                                                     \
  void round_activations(const T* x, const Packed& matrix, const Rounded& out, int64_t from, int64_t to) {         \
    for (int64_t token = from; token < to; ++token)                                                                \
      each_piece(x, matrix, out.tokens, token, [&](const float* piece, int64_t place) {                            \
        round_piece(piece, out.values + place * PIECE, out.scales + place, out.sums + place);                      \
      });                                                                                                          \
  }                                                                                                                \
  void order_activations(const T* x, const Packed& matrix, const Ordered& out, int64_t from, int64_t to) {         \
    for (int64_t token = from; token < to; ++token)                                                                \
      each_piece(x, matrix, out.tokens, token, [&](const float* piece, int64_t place) {                            \
        order_piece(piece, out.values + place * PIECE);                                                            \
      });                                                                                                          \
  }

MEGACPT_ACTIVATIONS(float)
MEGACPT_ACTIVATIONS(BFloat16)
MEGACPT_ACTIVATIONS(Float16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
