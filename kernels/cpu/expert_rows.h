// A row of one number an expert, in float32 lanes: reading, writing, and the sums over it.
// Included like vectors.h, and after it. Rows are padded to LANES; sums run in LANES lanes, whatever the register.

constexpr int LANES = 16;
constexpr int PARTS = LANES / WIDTH;
typedef int64_t Longs __attribute__((vector_size(WIDTH * sizeof(int64_t))));

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline Floats at(const float* row, int64_t i) { return read<Floats>(row + i); }

inline void put(float* row, int64_t i, Floats value) { __builtin_memcpy(row + i, &value, sizeof value); }

inline float widened(float value) { return value; }

inline float widened(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide = 0.0f;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Half precision: shift exponent and mantissa into place and multiply by 2^112, which also puts subnormals right.
inline float widened(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  uint32_t bits = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const bool finite = bits < 0x0f800000u;
  bits |= sign | (finite ? 0u : 0x70000000u);
  float wide = 0.0f;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return finite ? wide * 5.192296858534828e33f : wide;
}

inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, BFloat16& to) { to.bits = rounded(all(value))[0] >> 16; }

// To half precision, to nearest even; what is too large becomes infinity.
inline void narrow(float value, Float16& to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    to.bits = sign | 0x7e00u;
  } else if (bits >= 0x477ff000u) {
    to.bits = sign | 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the hardware round at the right bit
    float wide = 0.0f;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    wide += 0.5f;
    __builtin_memcpy(&bits, &wide, sizeof bits);
    to.bits = sign | static_cast<uint16_t>(bits - 0x3f000000u);
  } else {
    to.bits = sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
  }
}

// Copies a row to float32 and fills it up with `filling`.
template <typename T>
inline void load_row(const T* from, int64_t count, float* row, float filling) {
  for (int64_t i = 0; i < count; ++i) row[i] = widened(from[i]);
  for (int64_t i = count; i < padded(count); ++i) row[i] = filling;
}

template <>
inline void load_row(const float* from, int64_t count, float* row, float filling) {
  __builtin_memcpy(row, from, count * sizeof(float));
  for (int64_t i = count; i < padded(count); ++i) row[i] = filling;
}

template <typename T>
inline void store_row(const float* row, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) narrow(row[i], to[i]);
}

template <>
inline void store_row(const float* row, int64_t count, float* to) {
  __builtin_memcpy(to, row, count * sizeof(float));
}

// Joins the lanes in halves, always in the same order.
template <typename Join>
inline float join_lanes(const Floats (&parts)[PARTS], const Join& join) {
  float lanes[LANES];
  for (int part = 0; part < PARTS; ++part) put(lanes, part * WIDTH, parts[part]);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] = join(lanes[lane], lanes[lane + width]);
  return lanes[0];
}

// The sum over a padded row of what term(i) gives for the elements from i on.
template <typename Term>
inline float sum_over(int64_t count, const Term& term) {
  Floats parts[PARTS] = {};
  for (int64_t i = 0; i < padded(count); i += LANES)
    for (int part = 0; part < PARTS; ++part) parts[part] += term(i + part * WIDTH);
  return join_lanes(parts, [](float a, float b) { return a + b; });
}

inline float largest(const float* row, int64_t count) {
  Floats parts[PARTS];
  for (Floats& part : parts) part = all(-INFINITE);
  for (int64_t i = 0; i < padded(count); i += LANES)
    for (int part = 0; part < PARTS; ++part) parts[part] = maximum(parts[part], at(row, i + part * WIDTH));
  return join_lanes(parts, [](float a, float b) { return b > a ? b : a; });
}

// Calls work(i) for every register of a padded row.
template <typename Work>
inline void each(int64_t count, const Work& work) {
  for (int64_t i = 0; i < padded(count); i += WIDTH) work(i);
}

// 1 / (1 + exp(-x)), without overflow.
inline Floats sigmoid(Floats x) {
  const Floats small = exp_nonpositive(x < 0.0f ? x : -x);
  return (x < 0.0f ? small : all(1.0f)) / (1.0f + small);
}
