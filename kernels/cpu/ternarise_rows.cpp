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

struct Float8 {  // e4m3
  uint8_t bits;
};

// Bytes as numbers and back, by way of 16 bits: both steps at once would be made lane by lane.
inline Bits wide_bytes(const void* from) {
  return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Halves), Bits);
}

inline void write_bytes(Bits bits, uint8_t* to) {
  const Bytes narrow = __builtin_convertvector(__builtin_convertvector(bits, Halves), Bytes);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

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

// What is wanted of weights: their values, their codes, or both.
enum Wanted { VALUES = 1, CODES = 2, BOTH = 3 };

// A register of weights; `codes` gets code + 1.
template <Wanted WANTED, typename T, typename Out>
inline void quantise(const T* weight, Out* out, uint8_t* codes, const Levels<Out>& levels, Counters& counters) {
  const Floats x = wide(weight), twice = x + x;
  const Ints up = twice > levels.scale, down = twice < -levels.scale, code = up - down;  // -1 for 1
  counters.zeros -= code == 0;
  if constexpr (WANTED & VALUES) {
    const Floats former = wide(out);
    const Ints was = (Ints)(former > 0.0f) - (Ints)(former < 0.0f);
    Bits value = up ? levels.up : down ? levels.down : levels.zero;
    value = x != x ? levels.nan : value;
    counters.flips -= code != was;
    write_bits(value, out);
  } else {
    counters.flips -= code != 0;
  }
  if constexpr (WANTED & CODES) write_bytes((Bits)(1 - code), codes);
}

template <Wanted WANTED, typename T, typename Out>
inline void quantise_part(const T* weight, Out* out, uint8_t* codes, const Levels<Out>& levels, int64_t count,
                          Counters& counters) {
  T weights[WIDTH] = {};
  Out values[WIDTH] = {};  // the filling counts as zeros, which are taken off again, and never as a flip
  uint8_t stored[WIDTH] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    weights[lane] = weight[lane];
    if constexpr (WANTED & VALUES) values[lane] = out[lane];
  }
  quantise<WANTED>(weights, values, stored, levels, counters);
  for (int64_t lane = 0; lane < count; ++lane) {
    if constexpr (WANTED & VALUES) out[lane] = values[lane];
    if constexpr (WANTED & CODES) codes[lane] = stored[lane];
  }
  counters.zeros[0] -= static_cast<int32_t>(WIDTH - count);
}

// Four bytes of code + 1 become two bits each of one byte.
inline void pack(const uint8_t* codes, uint8_t* packed, int64_t bytes) {
  int64_t j = 0;
  for (; j + WIDTH <= bytes; j += WIDTH) {
    const Bits four = read<Bits>(codes + 4 * j);
    write_bytes((four | four >> 6 | four >> 12 | four >> 18) & 0xffu, packed + j);
  }
  for (; j < bytes; ++j) {
    const uint8_t* four = codes + 4 * j;
    packed[j] = static_cast<uint8_t>(four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6);
  }
}

template <Wanted WANTED, typename T, typename Out>
inline void quantise_rows(const T* weight, Out* out, const TernaryMatrix& matrix, uint8_t* codes, int64_t from,
                          int64_t to, TernaryCounts& counts) {
  const int64_t part = matrix.rows / matrix.halves, each = part / matrix.row_blocks;
  const int64_t columns = matrix.width / matrix.column_blocks, bytes = (matrix.width + 3) / 4;
  constexpr int64_t STEP = WANTED & VALUES ? 1 : 0;  // a null pointer stays one
  for (int64_t row = from; row < to; ++row) {
    const int64_t block = row / matrix.rows * matrix.row_blocks + row % matrix.rows % part / each;
    Counters counters = {};
    for (int64_t c = 0; c < matrix.column_blocks; ++c) {
      const Levels<Out> levels(matrix.scales[block * matrix.column_blocks + c]);
      const int64_t first = row * matrix.width + c * columns;
      Out* values = out + STEP * first;
      uint8_t* stored = codes + c * columns;
      int64_t j = 0;
      for (; j + WIDTH <= columns; j += WIDTH)
        quantise<WANTED>(weight + first + j, values + STEP * j, stored + j, levels, counters);
      if (j < columns)
        quantise_part<WANTED>(weight + first + j, values + STEP * j, stored + j, levels, columns - j, counters);
    }
    if constexpr (WANTED & CODES) {
      for (int64_t j = matrix.width; j < 4 * bytes; ++j) codes[j] = 1;
      pack(codes, matrix.packed + row * bytes, bytes);
    }
    for (int lane = 0; lane < WIDTH; ++lane) counts.zeros += counters.zeros[lane], counts.flips += counters.flips[lane];
  }
}

// A register of codes: each stored in a byte as code + 1, or as float8 e4m3.
inline Floats code(const uint8_t* stored) { return __builtin_convertvector((Ints)wide_bytes(stored) - 1, Floats); }

inline Floats code(const Float8* stored) {
  const Bits bits = wide_bytes(stored);
  return (Floats)((bits & 0x80u) << 24 | (bits & 0x7fu) << 20) * 0x1p120f;  // exponents of float32 begin 120 lower
}

template <typename Code, typename Out>
inline void unpack_row(const Code* codes, Out* out, float scale, int64_t count) {
  int64_t j = 0;
  for (; j + WIDTH <= count; j += WIDTH) write(code(codes + j) * scale, out + j);
  if (j == count) return;
  Code part[WIDTH] = {};
  for (int64_t lane = 0; lane < count - j; ++lane) part[lane] = codes[j + lane];
  write_part(code(part) * scale, out + j, count - j);
}

// Two bits each of one byte become four bytes.
inline void spread(const uint8_t* packed, uint8_t* codes, int64_t bytes) {
  int64_t j = 0;
  for (; j + WIDTH <= bytes; j += WIDTH) {
    const Bits byte = wide_bytes(packed + j), four = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303u;
    __builtin_memcpy(codes + 4 * j, &four, sizeof four);
  }
  for (; j < bytes; ++j)
    for (int place = 0; place < 4; ++place) codes[4 * j + place] = packed[j] >> (2 * place) & 3;
}

template <typename Out>
inline void unpack(Out* out, const TernaryMatrix& matrix, bool bytes, uint8_t* codes, int64_t from, int64_t to) {
  const int64_t part = matrix.rows / matrix.halves, each = part / matrix.row_blocks;
  const int64_t columns = matrix.width / matrix.column_blocks, packed = (matrix.width + 3) / 4;
  for (int64_t row = from; row < to; ++row) {
    const int64_t block = row / matrix.rows * matrix.row_blocks + row % matrix.rows % part / each;
    if (!bytes) spread(matrix.packed + row * packed, codes, packed);
    for (int64_t c = 0; c < matrix.column_blocks; ++c) {
      const float scale = matrix.scales[block * matrix.column_blocks + c];
      const int64_t first = row * matrix.width + c * columns;
      if (bytes)
        unpack_row(reinterpret_cast<const Float8*>(matrix.packed) + first, out + first, scale, columns);
      else
        unpack_row(codes + c * columns, out + first, scale, columns);
    }
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
    if (matrix.out == nullptr)                                                                                      \
      quantise_rows<CODES>(weight, out, matrix, codes, from, to, counts);                                           \
    else if (matrix.packed != nullptr)                                                                              \
      quantise_rows<BOTH>(weight, out, matrix, codes, from, to, counts);                                            \
    else                                                                                                            \
      quantise_rows<VALUES>(weight, out, matrix, codes, from, to, counts);                                          \
  }

#define MEGACPT_UNPACK_ROWS(Out)                                                                                 \
  void unpack_rows(Out* out, const TernaryMatrix& matrix, bool bytes, uint8_t* codes, int64_t from, int64_t to) { \
    unpack(out, matrix, bytes, codes, from, to);                                                                 \
  }

MEGACPT_ABS_SUM_ROWS(float)
MEGACPT_ABS_SUM_ROWS(BFloat16)
MEGACPT_ABS_SUM_ROWS(Float16)
MEGACPT_TERNARISE_ROWS(float, float)
MEGACPT_TERNARISE_ROWS(float, BFloat16)
MEGACPT_TERNARISE_ROWS(float, Float16)
MEGACPT_TERNARISE_ROWS(BFloat16, BFloat16)
MEGACPT_TERNARISE_ROWS(Float16, Float16)
MEGACPT_UNPACK_ROWS(float)
MEGACPT_UNPACK_ROWS(BFloat16)
MEGACPT_UNPACK_ROWS(Float16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
