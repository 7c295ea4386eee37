// Vectors of the instruction set that a file of row functions is compiled for, and what rows of numbers need of them.
// Included inside `namespace megacpt::MEGACPT_ISA { namespace {`: nothing here may be shared between instruction sets.
//
// Multiplications and additions are not contracted, so that every instruction set and every compiler gives the same bits.

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(WIDTH * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

constexpr float INFINITE = __builtin_inff();

inline Floats all(float value) { return Floats{} + value; }

template <typename Vector>
inline Vector read(const void* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// Round to bfloat16, to nearest even, in the upper 16 bits; a NaN stays one whatever its payload.
inline Bits rounded(Floats value) {
  const Bits bits = (Bits)value, is_nan = (Bits)(value != value);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) | (0x7fc00000u & is_nan);
}

inline Floats maximum(Floats a, Floats b) { return b > a ? b : a; }

// exp(x) for x <= 0, within 1 ulp; 0 below -87 (under 2e-38 of the largest term), NaN for NaN.
// 2^n * p(r) with r = x - n ln 2, |r| <= ln 2 / 2, and p fitted for the least relative error (3e-9).
inline Floats exp_nonpositive(Floats x) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
  Floats q = all(1.38145988e-3f);
  q = q * r + 8.36871658e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 1.66665211e-1f;
  q = q * r + 4.99999940e-1f;
  const Floats p = q * (r * r) + r + 1.0f;
  const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;  // a product with 2^n, unlike an integer sum, keeps NaN
  return x < -87.0f ? Floats{} : p * (Floats)power;
}
