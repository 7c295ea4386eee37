// Cross entropy of single rows of logits. This file is compiled once for every instruction set (MEGACPT_ISA names the
// namespace), so it must not use anything from the C++ library: a shared inline function compiled for AVX-512 here could
// be the copy that the linker keeps for a machine without it.
//
// Sums run in 32 float32 lanes, whatever the width of a register, and multiplications and additions are not contracted:
// every instruction set and every compiler gives the same bits. Little-endian.

#include "cross_entropy_rows.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

// Elements are taken in groups of 32, as PARTS pairs of registers. Element e of a float32 group goes to lane e, that of a
// bfloat16 group to lane e / 2 + (e % 2) * 16: even and odd ones come apart with a shift and a mask, where widening them
// in order would take shuffles.
constexpr int GROUP = 32;
constexpr int HALF = GROUP / 2;
constexpr int PARTS = HALF / WIDTH;
constexpr int64_t BLOCK = 512;  // elements whose maximum is taken before their exponentials: stays in the L1 cache

struct Pair {
  Floats low, high;  // lanes part * WIDTH and HALF + part * WIDTH of a group
};

inline Pair load(const float* group, int part) {
  return {read<Floats>(group + part * WIDTH), read<Floats>(group + HALF + part * WIDTH)};
}

inline Pair load(const BFloat16* group, int part) {
  const Bits words = read<Bits>(group + 2 * part * WIDTH);
  return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}

inline void store(float* group, int part, Pair pair) {
  __builtin_memcpy(group + part * WIDTH, &pair.low, sizeof pair.low);
  __builtin_memcpy(group + HALF + part * WIDTH, &pair.high, sizeof pair.high);
}

inline void store(BFloat16* group, int part, Pair pair) {
  const Bits words = (rounded(pair.low) >> 16) | (rounded(pair.high) & 0xffff0000u);
  __builtin_memcpy(group + 2 * part * WIDTH, &words, sizeof words);
}

// The last `count` elements of a row, filled up with -inf to a group.
template <typename T>
struct Tail {
  T group[GROUP];

  Tail(const T* from, int64_t count) {
    for (int part = 0; part < PARTS; ++part) store(group, part, {all(-INFINITE), all(-INFINITE)});
    __builtin_memcpy(group, from, count * sizeof(T));
  }
};

inline float element(const float* from) { return *from; }
inline float element(const BFloat16* from) { return load(Tail<BFloat16>(from, 1).group, 0).low[0]; }

inline void set_element(float* to, float value) { *to = value; }
inline void set_element(BFloat16* to, float value) { to->bits = rounded(all(value))[0] >> 16; }

// Joins the 32 lanes in halves, always in the same order.
template <typename Join>
inline float reduce(const Pair (&pairs)[PARTS], const Join& join) {
  float lanes[GROUP];
  for (int part = 0; part < PARTS; ++part) store(lanes, part, pairs[part]);
  for (int width = HALF; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] = join(lanes[lane], lanes[lane + width]);
  return lanes[0];
}

// Calls take(group) for all groups of a stretch of a row.
template <typename T, typename Take>
inline void each_group(const T* row, int64_t count, const Take& take) {
  int64_t i = 0;
  for (; i + GROUP <= count; i += GROUP) take(row + i);
  if (i < count) take(Tail<T>(row + i, count - i).group);
}

template <typename T>
inline float block_maximum(const T* row, int64_t count) {
  Pair top[PARTS];
  for (Pair& pair : top) pair = {all(-INFINITE), all(-INFINITE)};
  each_group(row, count, [&](const T* group) {
    for (int part = 0; part < PARTS; ++part) {
      const Pair x = load(group, part);
      top[part] = {maximum(top[part].low, x.low), maximum(top[part].high, x.high)};
    }
  });
  return reduce(top, [](float a, float b) { return b > a ? b : a; });
}

// Fetches into the cache, while memory idles over a block that is there already. An address past the end is harmless.
inline void fetch(uintptr_t address, uintptr_t bytes) {
  for (uintptr_t line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(address + line));
}

template <typename T>
inline float block_sum(const T* row, int64_t count, float shift) {
  Pair sum[PARTS];
  for (Pair& pair : sum) pair = {Floats{}, Floats{}};
  each_group(row, count, [&](const T* group) {
    fetch(reinterpret_cast<uintptr_t>(group) + BLOCK * sizeof(T), GROUP * sizeof(T));
    for (int part = 0; part < PARTS; ++part) {
      const Pair x = load(group, part);
      sum[part].low += exp_nonpositive(x.low - shift);
      sum[part].high += exp_nonpositive(x.high - shift);
    }
  });
  return reduce(sum, [](float a, float b) { return a + b; });
}

template <typename T>
inline void scaled_exponentials(const T* from, T* to, float shift, float scale) {
  for (int part = 0; part < PARTS; ++part) {
    const Pair x = load(from, part);
    store(to, part, {exp_nonpositive(x.low - shift) * scale, exp_nonpositive(x.high - shift) * scale});
  }
}

template <typename T>
inline void partials(const T* logits, const Partials& out, const int64_t* target, const Shape& shape, int64_t n) {
  const T* row = logits + n * shape.vocab;
  float top = -INFINITE, shift = 0.0f;
  double sum = 0.0;  // over blocks; inside a block float32 lanes
  for (int64_t start = 0; start < shape.vocab; start += BLOCK) {
    const int64_t count = shape.vocab - start < BLOCK ? shape.vocab - start : BLOCK;
    const float block_top = block_maximum(row + start, count);
    if (block_top > top) {
      sum *= exp_nonpositive(all(top - block_top))[0];  // at the first block the exponent is -inf, and the sum 0
      top = shift = block_top;
    }
    sum += block_sum(row + start, count, shift);
  }
  const int64_t column = target[n] - shape.vocab_start;
  out.row_max[n] = top;
  out.sum_exp[n] = static_cast<float>(sum);
  out.target_logit[n] = column >= 0 && column < shape.vocab ? element(row + column) : 0.0f;
}

template <typename T>
inline void gradient(const T* logits, T* grad, const Normalizer& norm, const int64_t* target, const Shape& shape,
                     int64_t n) {
  const T* row = logits + n * shape.vocab;
  T* out = grad + n * shape.vocab;
  const float shift = norm.row_max[n], upstream = norm.grad_loss[n], scale = upstream / norm.sum_exp[n];
  const int64_t column = target[n] - shape.vocab_start;
  const bool here = column >= 0 && column < shape.vocab;
  const float at_target = here ? element(row + column) : 0.0f;  // read first: `out` may be `row`
  int64_t i = 0;
  for (; i + GROUP <= shape.vocab; i += GROUP) scaled_exponentials(row + i, out + i, shift, scale);
  if (i < shape.vocab) {
    Tail<T> tail(row + i, shape.vocab - i);
    scaled_exponentials(tail.group, tail.group, shift, scale);
    __builtin_memcpy(out + i, tail.group, (shape.vocab - i) * sizeof(T));
  }
  if (here) set_element(out + column, exp_nonpositive(all(at_target - shift))[0] * scale - upstream);
}

}  // namespace

#define MEGACPT_ROWS(T)                                                                                            \
  void partials_rows(const T* logits, const Partials& out, const int64_t* target, const Shape& shape,              \
                     int64_t from, int64_t to) {                                                                   \
    for (int64_t n = from; n < to; ++n) partials(logits, out, target, shape, n);                                   \
  }                                                                                                                \
  void gradient_rows(const T* logits, T* grad, const Normalizer& norm, const int64_t* target, const Shape& shape,  \
                     int64_t from, int64_t to) {                                                                   \
    for (int64_t n = from; n < to; ++n) gradient(logits, grad, norm, target, shape, n);                            \
  }

MEGACPT_ROWS(float)
MEGACPT_ROWS(BFloat16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
