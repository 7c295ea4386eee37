// Rows of weights to ternary values, codes and absolute sums (megacpt/ops/ternarise_reference.py). Compiled once for
// every instruction set, so it must not use anything from the C++ library (see cross_entropy_rows.cpp).
//
// There is no division: the code is 1 where round(clip(w / scale, -1, 1)) is, which is where the quotient, rounded to
// float32, is above 1/2. As the next float after 1/2 is 2^-24 further and ties go to the even 1/2, that is where
// w > scale (1/2 + 2^-25); between scale / 2 and that lies no float, subnormals included: it is where 2 w > scale.

#include "ternarise_rows.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "formats.h"

typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

inline Doubles magnitude(Floats value) {
  return __builtin_convertvector((Floats)((Bits)value & 0x7fffffffu), Doubles);
}

template <typename T>
inline double abs_sum(const T* from, int64_t count) {
  constexpr int PARTS = SUM_LANES / WIDTH;
  Doubles parts[PARTS] = {};
  int64_t j = 0;
  for (; j + SUM_LANES <= count; j += SUM_LANES)
    for (int part = 0; part < PARTS; ++part) parts[part] += magnitude(wide(from + j + part * WIDTH));
  for (int part = 0; j < count; ++part, j += WIDTH)
    parts[part] += magnitude(count - j >= WIDTH ? wide(from + j) : wide_part(from + j, count - j, 0.0f));
  double lanes[SUM_LANES];
  __builtin_memcpy(lanes, parts, sizeof parts);
  for (int half = SUM_LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

inline void write_bits(Bits bits, float* to) { __builtin_memcpy(to, &bits, sizeof bits); }

template <typename Half>
inline void write_bits(Bits bits, Half* to) {
  const Halves narrow = __builtin_convertvector(bits, Halves);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

inline uint32_t bits_of(float value) { return read<uint32_t>(&value); }
inline uint32_t bits_of(BFloat16 value) { return value.bits; }
inline uint32_t bits_of(Float16 value) { return value.bits; }

template <typename Out>
inline uint32_t bits_in(float value, Out) {
  Out group[WIDTH];
  write(all(value), group);
  return bits_of(group[0]);
}

// What is the same for all weights that share a scale: the bits of the three values, and of NaN.
template <typename Out>
struct Levels {
  Floats scale;
  Bits up, down, zero, nan;

  explicit Levels(float of) : scale(all(of)) {
    up = Bits{} + bits_in(of, Out{});
    down = Bits{} + bits_in(-of, Out{});
    zero = Bits{} + bits_in(of - of, Out{});  // NaN if the scale is no finite number
    nan = Bits{} + bits_in(__builtin_nanf(""), Out{});
  }
};

struct Counters {
  Ints zeros, flips;
};

// A register of weights; `codes` gets code + 1 where they are wanted.
template <bool CODES, typename T, typename Out>
inline void quantise(const T* weight, Out* out, uint8_t* codes, const Levels<Out>& levels, Counters& counters) {
  const Floats x = wide(weight), twice = x + x, former = wide(out);
  const Ints up = twice > levels.scale, down = twice < -levels.scale, code = up - down;  // -1 for 1
  const Ints was = (Ints)(former > 0.0f) - (Ints)(former < 0.0f);
  Bits value = up ? levels.up : down ? levels.down : levels.zero;
  value = x != x ? levels.nan : value;
  counters.zeros -= code == 0;
  counters.flips -= code != was;
  write_bits(value, out);
  if constexpr (CODES) {
    const Bytes stored = __builtin_convertvector((Bits)(1 - code), Bytes);
    __builtin_memcpy(codes, &stored, sizeof stored);
  }
}

template <bool CODES, typename T, typename Out>
inline void quantise_part(const T* weight, Out* out, uint8_t* codes, const Levels<Out>& levels, int64_t count,
                          Counters& counters) {
  T weights[WIDTH] = {};
  Out values[WIDTH] = {};  // the filling counts as zeros, which are taken off again, and never as a flip
  uint8_t stored[WIDTH] = {};
  for (int64_t lane = 0; lane < count; ++lane) weights[lane] = weight[lane], values[lane] = out[lane];
  quantise<CODES>(weights, values, stored, levels, counters);
  for (int64_t lane = 0; lane < count; ++lane) {
    out[lane] = values[lane];
    if constexpr (CODES) codes[lane] = stored[lane];
  }
  counters.zeros[0] -= static_cast<int32_t>(WIDTH - count);
}

// Four bytes of code + 1 become two bits each of one byte.
inline void pack(const uint8_t* codes, uint8_t* packed, int64_t bytes) {
  int64_t j = 0;
  for (; j + WIDTH <= bytes; j += WIDTH) {
    const Bits four = read<Bits>(codes + 4 * j);
    const Bytes joined = __builtin_convertvector((four | four >> 6 | four >> 12 | four >> 18) & 0xffu, Bytes);
    __builtin_memcpy(packed + j, &joined, sizeof joined);
  }
  for (; j < bytes; ++j) {
    const uint8_t* four = codes + 4 * j;
    packed[j] = static_cast<uint8_t>(four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6);
  }
}

template <bool CODES, typename T, typename Out>
inline void quantise_rows(const T* weight, Out* out, const TernaryMatrix& matrix, uint8_t* codes, int64_t from,
                          int64_t to, TernaryCounts& counts) {
  const int64_t part = matrix.rows / matrix.halves, each = part / matrix.row_blocks;
  const int64_t columns = matrix.width / matrix.column_blocks, bytes = (matrix.width + 3) / 4;
  for (int64_t row = from; row < to; ++row) {
    const int64_t block = row / matrix.rows * matrix.row_blocks + row % matrix.rows % part / each;
    Counters counters = {};
    for (int64_t c = 0; c < matrix.column_blocks; ++c) {
      const Levels<Out> levels(matrix.scales[block * matrix.column_blocks + c]);
      const int64_t first = row * matrix.width + c * columns;
      uint8_t* stored = codes + c * columns;
      int64_t j = 0;
      for (; j + WIDTH <= columns; j += WIDTH)
        quantise<CODES>(weight + first + j, out + first + j, stored + j, levels, counters);
      if (j < columns)
        quantise_part<CODES>(weight + first + j, out + first + j, stored + j, levels, columns - j, counters);
    }
    if constexpr (CODES) {
      for (int64_t j = matrix.width; j < 4 * bytes; ++j) codes[j] = 1;
      pack(codes, matrix.packed + row * bytes, bytes);
    }
    for (int lane = 0; lane < WIDTH; ++lane) counts.zeros += counters.zeros[lane], counts.flips += counters.flips[lane];
  }
}

template <typename T>
inline void sum_rows(const T* weight, const TernaryMatrix& matrix, int64_t from, int64_t to) {
  const int64_t columns = matrix.width / matrix.column_blocks;
  for (int64_t n = from * matrix.column_blocks; n < to * matrix.column_blocks; ++n)
    matrix.row_sums[n] = abs_sum(weight + n * columns, columns);
}

}  // namespace

#define MEGACPT_ABS_SUM_ROWS(T)                                                                \
  void abs_sum_rows(const T* weight, const TernaryMatrix& matrix, int64_t from, int64_t to) {  \
    sum_rows(weight, matrix, from, to);                                                        \
  }
#define MEGACPT_TERNARISE_ROWS(T, Out)                                                                              \
  void ternarise_rows(const T* weight, Out* out, const TernaryMatrix& matrix, uint8_t* codes, int64_t from,         \
                      int64_t to, TernaryCounts& counts) {                                                          \
    if (matrix.packed != nullptr)                                                                                   \
      quantise_rows<true>(weight, out, matrix, codes, from, to, counts);                                            \
    else                                                                                                            \
      quantise_rows<false>(weight, out, matrix, codes, from, to, counts);                                           \
  }

MEGACPT_ABS_SUM_ROWS(float)
MEGACPT_ABS_SUM_ROWS(BFloat16)
MEGACPT_ABS_SUM_ROWS(Float16)
MEGACPT_TERNARISE_ROWS(float, float)
MEGACPT_TERNARISE_ROWS(float, BFloat16)
MEGACPT_TERNARISE_ROWS(float, Float16)
MEGACPT_TERNARISE_ROWS(BFloat16, BFloat16)
MEGACPT_TERNARISE_ROWS(Float16, Float16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
