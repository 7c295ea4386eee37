// Column sums of the softmax of rows: all that an iteration of Sinkhorn's algorithm needs of the logits. Compiled once
// for every instruction set, so it must not use anything from the C++ library (see cross_entropy_rows.cpp).
//
// Rows are taken in blocks that stay in the L1 cache, one stage for all rows of a block before the next one: the stages
// of a single row wait for each other, those of different rows do not. Exponentials are computed anew in every
// iteration: to keep them would take a tensor of the size of the logits, whose fresh pages cost as much as a few
// iterations. A probability is rounded to 2^-24 here, and summed in units of 2^-30 as everywhere.

#include "sinkhorn_rows.h"

namespace megacpt {
namespace MEGACPT_ISA {
namespace {

#include "vectors.h"

#include "formats.h"

typedef int64_t Longs __attribute__((vector_size(WIDTH * sizeof(int64_t))));

constexpr int LANES = 16;
constexpr int PARTS = LANES / WIDTH;
constexpr int64_t TERMS = 4096;          // of a block: 16 KiB
constexpr int64_t MOST_ROWS = 64;        // of a block: 64 probabilities of 1 fit the 32-bit sums
constexpr float UNITS = 16777216.0f;     // 2^24, a probability of 1 within a block: what float32 resolves
constexpr int TO_FIXED = 6;              // from there to 2^30

struct Block {
  alignas(64) float terms[TERMS];
  alignas(64) float lanes[MOST_ROWS * LANES];  // of what is joined over a row
  alignas(64) float top[MOST_ROWS];
  alignas(64) float scale[MOST_ROWS];  // the row's sum, then what a term is worth
  int64_t rows, width;                 // `width`: experts, padded
};

// exp(x) for x <= 0, within some ulp: 2^n p(r) with n + r = x / ln 2, |r| <= 1/2, and p fitted for the least relative
// error (9e-8). Never below 2^-126, which counts as nothing here; NaN for NaN.
inline Floats exp_of_term(Floats x) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  Floats y = x * 1.44269504088896341f;
  y = y < -126.0f ? all(-126.0f) : y;
  const Floats shifted = y + magic;
  const Floats r = y - (shifted - magic);
  Floats p = all(1.326461166e-3f);
  p = p * r + 9.671512741e-3f;
  p = p * r + 5.550734023e-2f;
  p = p * r + 2.402224211e-1f;
  p = p * r + 6.931469775e-1f;
  p = p * r + 1.0f;
  return p * (Floats)(((Ints)shifted << 23) + 0x3f800000);  // the low bits of `magic` are 0
}

// Writes logits + log u of a row, and the largest of each lane.
template <typename T>
inline void load(const T* logits, const Balancing& in, int64_t width, float* row, float* lanes) {
  Floats tops[PARTS];
  for (Floats& top : tops) top = all(-INFINITE);
  for (int64_t i = 0; i < width; i += LANES)
    for (int part = 0; part < PARTS; ++part) {
      const int64_t at = i + part * WIDTH;
      const int64_t left = in.experts - at;
      const Floats x = left >= WIDTH ? wide(logits + at) : wide_part(logits + at, left, -INFINITE);
      const Floats moved = x + read<Floats>(in.log_u + at);
      write(moved, row + at);
      tops[part] = maximum(tops[part], moved);
    }
  for (int part = 0; part < PARTS; ++part) write(tops[part], lanes + part * WIDTH);
}

// Replaces a row by its exponentials, and writes the sum of each lane: there is a NaN if the row holds NaN or +inf, or
// nothing but -inf.
inline void exponentials(float* row, int64_t width, float top, float* lanes) {
  Floats sums[PARTS] = {};
  for (int64_t i = 0; i < width; i += LANES)
    for (int part = 0; part < PARTS; ++part) {
      const Floats term = exp_of_term(read<Floats>(row + i + part * WIDTH) - top);
      write(term, row + i + part * WIDTH);
      sums[part] += term;
    }
  for (int part = 0; part < PARTS; ++part) write(sums[part], lanes + part * WIDTH);
}

template <typename Join>
inline float joined(const float* lanes, const Join& join) {
  Floats parts[PARTS];
  for (int part = 0; part < PARTS; ++part) parts[part] = read<Floats>(lanes + part * WIDTH);
  return join_registers(parts, join);
}

inline void leave_out(Block& block, int64_t r) {
  for (int64_t i = 0; i < block.width; ++i) block.terms[r * block.width + i] = 0.0f;
  block.scale[r] = 1.0f;
}

// Adds the rows, in fixed point.
inline void add(const Block& block, int64_t* sums) {
  for (int64_t i = 0; i < block.width; i += WIDTH) {
    Ints sum = {};
    for (int64_t r = 0; r < block.rows; ++r)
      sum += __builtin_convertvector(read<Floats>(block.terms + r * block.width + i) * block.scale[r] + 0.5f, Ints);
    const Longs total = read<Longs>(sums + i) + (__builtin_convertvector(sum, Longs) << TO_FIXED);
    __builtin_memcpy(sums + i, &total, sizeof total);
  }
}

template <typename T>
inline void add_block(const T* logits, const Balancing& in, int64_t first, Block& block, int64_t* sums) {
  const auto row = [&](int64_t r) { return block.terms + r * block.width; };
  const auto lanes = [&](int64_t r) { return block.lanes + r * LANES; };
  for (int64_t r = 0; r < block.rows; ++r) load(logits + (first + r) * in.experts, in, block.width, row(r), lanes(r));
  for (int64_t r = 0; r < block.rows; ++r)
    block.top[r] = joined(lanes(r), [](auto a, auto b) { return b > a ? b : a; });
  for (int64_t r = 0; r < block.rows; ++r) exponentials(row(r), block.width, block.top[r], lanes(r));
  for (int64_t r = 0; r < block.rows; ++r) block.scale[r] = joined(lanes(r), [](auto a, auto b) { return a + b; });
  for (int64_t r = 0; r < block.rows; ++r)
    if (block.scale[r] != block.scale[r] || (in.mask != nullptr && !in.mask[first + r])) leave_out(block, r);
  for (int64_t r = 0; r < block.rows; ++r) block.scale[r] = UNITS / block.scale[r];
  add(block, sums);
}

template <typename T>
inline void add_rows(const T* logits, const Balancing& in, int64_t* sums, int64_t from, int64_t to) {
  Block block;
  block.width = (in.experts + LANES - 1) / LANES * LANES;
  const int64_t most = TERMS / block.width < MOST_ROWS ? TERMS / block.width : MOST_ROWS;
  for (int64_t first = from; first < to; first += most) {
    block.rows = to - first < most ? to - first : most;
    add_block(logits, in, first, block, sums);
  }
}

}  // namespace

#define MEGACPT_SINKHORN_ROWS(T)                                                                                   \
  void softmax_sum_rows(const T* logits, const Balancing& in, int64_t* sums, int64_t from, int64_t to) {           \
    add_rows(logits, in, sums, from, to);                                                                          \
  }

MEGACPT_SINKHORN_ROWS(float)
MEGACPT_SINKHORN_ROWS(BFloat16)
MEGACPT_SINKHORN_ROWS(Float16)

}  // namespace MEGACPT_ISA
}  // namespace megacpt
