// A register of float32 from and to the formats of memory, and joining its lanes.
// Included like vectors.h, and after it.

typedef uint16_t Halves __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

inline Floats wide(const float* from) { return read<Floats>(from); }

inline Floats wide(const BFloat16* from) { return (Floats)(__builtin_convertvector(read<Halves>(from), Bits) << 16); }

// Half precision: shift exponent and mantissa into place and multiply by 2^112, which also puts subnormals right.
inline Floats wide(const Float16* from) {
  const Bits half = __builtin_convertvector(read<Halves>(from), Bits);
  const Bits sign = (half & 0x8000u) << 16, bits = (half & 0x7fffu) << 13;
  const Bits finite = (Bits)((Floats)(bits | sign) * 5.192296858534828e33f);
  return (Floats)(bits < 0x0f800000u ? finite : bits | sign | 0x70000000u);
}

// The first `count` elements of a register that begins at `from`; the others are `filling`.
template <typename T>
inline Floats wide_part(const T* from, int64_t count, float filling) {
  T group[WIDTH] = {};
  for (int64_t lane = 0; lane < count; ++lane) group[lane] = from[lane];
  Floats value = wide(group);
  for (int64_t lane = count < 0 ? 0 : count; lane < WIDTH; ++lane) value[lane] = filling;
  return value;
}

inline void write(Floats value, float* to) { __builtin_memcpy(to, &value, sizeof value); }

inline void write(Floats value, BFloat16* to) {
  const Halves bits = __builtin_convertvector(rounded(value) >> 16, Halves);
  __builtin_memcpy(to, &bits, sizeof bits);
}

// To half precision, to nearest even; what is too large becomes infinity.
inline void write(Floats value, Float16* to) {
  const Bits sign = ((Bits)value >> 16) & 0x8000u, bits = (Bits)value & 0x7fffffffu;
  const Bits normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const Bits subnormal = (Bits)((Floats)bits + 0.5f) - 0x3f000000u;  // adding 0.5 rounds at the right bit
  Bits half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x477ff000u ? Bits{} + 0x7c00u : half;
  half = bits > 0x7f800000u ? Bits{} + 0x7e00u : half;
  const Halves narrow = __builtin_convertvector(half | sign, Halves);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

template <typename T>
inline void write_part(Floats value, T* to, int64_t count) {
  T group[WIDTH];
  write(value, group);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = group[lane];
}

template <int N>
struct Register {
  typedef float Type __attribute__((vector_size(N * sizeof(float))));
};

// Joins the lanes of a register in halves, always in the same order.
template <int N, typename Join>
inline float join_halves(typename Register<N>::Type value, const Join& join) {
  if constexpr (N == 2) {
    return join(value[0], value[1]);
  } else {
    typename Register<N / 2>::Type halves[2];
    __builtin_memcpy(halves, &value, sizeof value);
    return join_halves<N / 2>(join(halves[0], halves[1]), join);
  }
}

// Joins 16 lanes that are spread over registers, in the order of join_halves<16>.
template <typename Join>
inline float join_registers(Floats (&parts)[16 / WIDTH], const Join& join) {
  for (int half = 16 / WIDTH / 2; half > 0; half /= 2)
    for (int part = 0; part < half; ++part) parts[part] = join(parts[part], parts[part + half]);
  return join_halves<WIDTH>(parts[0], join);
}
