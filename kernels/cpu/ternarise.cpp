// C interface of ternary quantisation: lists of matrices, whose rows are shared out among threads. Sums have a fixed
// order and counts are integers, so that the number of threads changes no bit.

#include "ternarise_rows.h"

#include <mutex>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"

namespace {

using namespace megacpt;

enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Some rows of a matrix of the list.
struct Piece {
  int matrix;
  int64_t from, to;
};

constexpr int64_t PIECE = ELEMENTS_PER_THREAD;  // numbers of a piece, or one row

// Calls work(piece) for pieces that cover the rows of all matrices.
template <typename Work>
void on_pieces(const TernaryMatrix* matrices, int count, int threads, const Work& work) {
  std::vector<Piece> pieces;
  for (int n = 0; n < count; ++n) {
    const int64_t rows = matrices[n].batch * matrices[n].rows;
    const int64_t each = std::max<int64_t>(1, PIECE / std::max(1, matrices[n].width));
    for (int64_t from = 0; from < rows; from += each) pieces.push_back({n, from, std::min(from + each, rows)});
  }
  parallel_over(static_cast<int64_t>(pieces.size()), PIECE, threads, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) work(pieces[n]);
  });
}

template <typename T>
void abs_sums(const TernaryMatrix* matrices, int count, int threads, int isa) {
  on_pieces(matrices, count, threads, [&](const Piece& piece) {
    const TernaryMatrix& matrix = matrices[piece.matrix];
    MEGACPT_ON_ISA(isa, abs_sum_rows(static_cast<const T*>(matrix.weight), matrix, piece.from, piece.to));
  });
}

// The sum over the rows of a block, in lanes as over columns; lanes that nothing goes to are zero and left out.
double block_sum(const TernaryMatrix& matrix, int64_t batch, int64_t block, int64_t column) {
  const int64_t part = matrix.rows / matrix.halves, each = part / matrix.row_blocks;
  int64_t used = 1;
  while (used < SUM_LANES && used < each * matrix.halves) used *= 2;
  double lanes[SUM_LANES] = {};
  for (int64_t n = 0; n < each * matrix.halves; ++n) {
    const int64_t row = batch * matrix.rows + n / each * part + block * each + n % each;
    lanes[n % SUM_LANES] += matrix.row_sums[row * matrix.column_blocks + column];
  }
  for (int64_t half = used / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <typename T, typename Out>
void ternarise(const TernaryMatrix* matrices, int count, TernaryCounts* counts, int threads, int isa) {
  std::fill(counts, counts + count, TernaryCounts{});
  std::mutex join;
  on_pieces(matrices, count, threads, [&](const Piece& piece) {
    const TernaryMatrix& matrix = matrices[piece.matrix];
    std::vector<uint8_t> codes(matrix.width + 64);
    TernaryCounts found{};
    MEGACPT_ON_ISA(isa, ternarise_rows(static_cast<const T*>(matrix.weight), static_cast<Out*>(matrix.out), matrix,
                                       codes.data(), piece.from, piece.to, found));
    const std::lock_guard<std::mutex> lock(join);
    counts[piece.matrix].zeros += found.zeros;
    counts[piece.matrix].flips += found.flips;
  });
}

template <typename Out>
void unpack(const TernaryMatrix& matrix, bool bytes, int threads, int isa) {
  on_pieces(&matrix, 1, threads, [&](const Piece& piece) {
    std::vector<uint8_t> codes(matrix.width + 64);
    MEGACPT_ON_ISA(isa, unpack_rows(static_cast<Out*>(matrix.out), matrix, bytes, codes.data(), piece.from, piece.to));
  });
}

}  // namespace

extern "C" {

// Fills the `sums` of all matrices, which are of one format.
MEGACPT_EXPORT void megacpt_block_abs_sums(const TernaryMatrix* matrices, int count, int format, int threads, int isa) {
  if (format == FLOAT32)
    abs_sums<float>(matrices, count, threads, isa);
  else if (format == BFLOAT16)
    abs_sums<BFloat16>(matrices, count, threads, isa);
  else
    abs_sums<Float16>(matrices, count, threads, isa);
  for (int n = 0; n < count; ++n) {
    const TernaryMatrix& matrix = matrices[n];
    const int64_t blocks = matrix.batch * matrix.row_blocks;
    parallel_over(blocks, matrix.rows / matrix.row_blocks * matrix.column_blocks, threads, [&](int64_t from, int64_t to) {
      for (int64_t block = from; block < to; ++block)
        for (int64_t c = 0; c < matrix.column_blocks; ++c)
          matrix.sums[block * matrix.column_blocks + c] =
              block_sum(matrix, block / matrix.row_blocks, block % matrix.row_blocks, c);
    });
  }
}

// Fills `out` and `packed`, where they are, of all matrices, which are of one format each for weights and values; counts
// [count].
MEGACPT_EXPORT void megacpt_ternarise(const TernaryMatrix* matrices, int count, int format, int out_format,
                                      TernaryCounts* counts, int threads, int isa) {
  if (format == BFLOAT16)
    ternarise<BFloat16, BFloat16>(matrices, count, counts, threads, isa);
  else if (format == FLOAT16)
    ternarise<Float16, Float16>(matrices, count, counts, threads, isa);
  else if (out_format == BFLOAT16)
    ternarise<float, BFloat16>(matrices, count, counts, threads, isa);
  else if (out_format == FLOAT16)
    ternarise<float, Float16>(matrices, count, counts, threads, isa);
  else
    ternarise<float, float>(matrices, count, counts, threads, isa);
}

// Fills `out` of a matrix with the values of `packed`: four codes a byte, or, with `bytes`, one in float8 e4m3.
MEGACPT_EXPORT void megacpt_unpack_ternary(const TernaryMatrix* matrix, int bytes, int out_format, int threads, int isa) {
  if (out_format == BFLOAT16)
    unpack<BFloat16>(*matrix, bytes != 0, threads, isa);
  else if (out_format == FLOAT16)
    unpack<Float16>(*matrix, bytes != 0, threads, isa);
  else
    unpack<float>(*matrix, bytes != 0, threads, isa);
}
}
