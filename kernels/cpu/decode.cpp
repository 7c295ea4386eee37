// A decoder's whole step for one token in one call: threads meet at the ends of phases, a few a layer, instead of
// starting anew for each of the dozens of small operations. The operations themselves are row functions, the products
// those of packed_linear and half_linear. What is computed is said in megacpt/serve/decoder.py.

#include <memory>

#include "decode_rows.h"
#include "half_linear_rows.h"
#include "instruction_set.h"
#include "packed_linear_rows.h"
#include "parallel.h"

extern "C" int omp_get_num_threads() __attribute__((weak));

namespace {

using namespace megacpt;

enum Format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, PACKED = 3 };

// The structures are those of megacpt/ops/decode_cpu.py.
struct Matrix {
  const void* data;
  const float* scales;  // of a packed one, [rows, blocks]
  const float* bias;    // [rows] or null
  int64_t rows, columns, blocks, format;

  int64_t pieces() const { return (columns / blocks + PIECE - 1) / PIECE; }

  Packed packed() const {
    const int64_t units = (columns / blocks + UNIT - 1) / UNIT;
    return {static_cast<const uint8_t*>(data), scales, rows, columns, blocks, units, pieces()};
  }
};

struct Layer {
  const float *attention_norm, *query_norm, *key_norm, *mlp_norm;  // those of the heads may be null
  Matrix qkv, output, gate_up, down;
};

struct Model {
  int64_t layers, hidden, heads, groups, width, inner, rotated, int8;
  double epsilon;
  const Layer* layer;
  const float *final_norm, *cosines, *sines;
  Matrix embedding, head;
};

struct Token {
  int64_t id, position, capacity;
  float *keys, *values;  // [layers, groups, capacity, width]
  float* logits;
};

constexpr int64_t PIECES_PER_THREAD = 4;  // smaller pieces even out threads that are held up
constexpr int SPINS = 1 << 12;            // before a thread that waits offers its core to others

struct Phase {
  std::atomic<int64_t> next{0}, arrived{0};
};

// What all threads see.
struct Shared {
  const Model& model;
  const Token& token;
  int isa;
  std::unique_ptr<Phase[]> phases;
  std::unique_ptr<float[]> memory;
  float *x, *joined, *attended, *inner, *product;

  Shared(const Model& model, const Token& token, int isa)
      : model(model), token(token), isa(isa), phases(new Phase[2 + 5 * model.layers]) {
    const int64_t queries = model.heads * model.width, keys = 2 * model.groups * model.width;
    memory.reset(new float[2 * model.hidden + 2 * queries + keys + 2 * model.inner]);
    x = memory.get();
    product = x + model.hidden;
    attended = product + model.hidden;
    joined = attended + queries;
    inner = joined + queries + keys;
  }
};

// Pieces of the activations that a packed matrix meets.
int64_t pieces(const Matrix& matrix) { return matrix.format == PACKED ? matrix.blocks * matrix.pieces() : 0; }

// One of the threads. All of them go through `run` and take pieces of its phases; what is small, each computes for
// itself.
class Member {
 public:
  Member(Shared& all, int64_t members) : all(all), model(all.model), phase(all.phases.get()), members(members) {
    int64_t most = pieces(model.head);
    for (int64_t l = 0; l < model.layers; ++l) {
      const Layer& layer = model.layer[l];
      most = std::max({most, pieces(layer.qkv), pieces(layer.output), pieces(layer.gate_up), pieces(layer.down)});
    }
    const int64_t row_size = std::max({model.hidden, model.inner, model.heads * model.width});
    memory.reset(new float[row_size + most * PIECE + 2 * most + all.token.position + 1]);
    row = memory.get();
    float* const values = row + row_size;
    float* const scales = values + most * PIECE;
    scores = scales + 2 * most;
    ordered = {values, 1};
    rounded = {reinterpret_cast<int8_t*>(values), scales, reinterpret_cast<int32_t*>(scales + most), 1};
  }

  void run() {
    share(1, [&](int64_t, int64_t) { embed(); });
    for (int64_t l = 0; l < model.layers; ++l) {
      const Layer& layer = model.layer[l];
      norm(layer.attention_norm);
      multiply(layer.qkv, row, all.joined);
      share(model.groups, [&](int64_t from, int64_t to) {
        for (int64_t group = from; group < to; ++group) attention(layer, l, group);
      });
      multiply_onto(layer.output, all.attended);
      norm(layer.mlp_norm);
      multiply(layer.gate_up, row, all.inner);
      MEGACPT_ON_ISA(all.isa, swiglu(all.inner, all.inner + model.inner, row, model.inner));
      multiply_onto(layer.down, row);
    }
    norm(model.final_norm);
    multiply(model.head, row, all.token.logits);
  }

 private:
  // Takes pieces of [0, count) until there are none, and waits for the others.
  template <typename Work>
  void share(int64_t count, const Work& work) {
    const int64_t pieces = std::min(count, members > 1 ? PIECES_PER_THREAD * members : 1);
    for (int64_t piece; (piece = phase->next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
      work(count * piece / pieces, count * (piece + 1) / pieces);
    phase->arrived.fetch_add(1, std::memory_order_acq_rel);
    for (int spins = 0; phase->arrived.load(std::memory_order_acquire) < members; ++spins)
      if (spins >= SPINS) std::this_thread::yield();
    ++phase;
  }

  void embed() {
    const Matrix& table = model.embedding;
    const int64_t at = all.token.id * table.columns;
    if (table.format == FLOAT32)
      MEGACPT_ON_ISA(all.isa, widen(static_cast<const float*>(table.data) + at, all.x, table.columns));
    else if (table.format == BFLOAT16)
      MEGACPT_ON_ISA(all.isa, widen(static_cast<const BFloat16*>(table.data) + at, all.x, table.columns));
    else
      MEGACPT_ON_ISA(all.isa, widen(static_cast<const Float16*>(table.data) + at, all.x, table.columns));
  }

  void norm(const float* weight) {
    MEGACPT_ON_ISA(all.isa, rms_norm(all.x, weight, row, model.hidden, static_cast<float>(model.epsilon)));
  }

  void attention(const Layer& layer, int64_t l, int64_t group) {
    const int64_t width = model.width, each = model.heads / model.groups, position = all.token.position;
    const int64_t cached = (l * model.groups + group) * all.token.capacity * width;
    float* const keys = all.joined + model.heads * width;
    const Attention in{all.joined + group * each * width,
                       keys + group * width,
                       keys + (model.groups + group) * width,
                       all.token.keys + cached,
                       all.token.values + cached,
                       all.attended + group * each * width,
                       scores,
                       each,
                       width,
                       position};
    const int64_t at = position * model.rotated;
    const Turn turn{model.cosines + at, model.sines + at, model.rotated, layer.query_norm, layer.key_norm,
                    static_cast<float>(model.epsilon)};
    MEGACPT_ON_ISA(all.isa, attend(in, turn));
  }

  // out = matrix * in + bias
  void multiply(const Matrix& matrix, const float* in, float* out) {
    multiply(matrix, in, out, [](int64_t, int64_t) {});
  }

  // x = x + matrix * in + bias
  void multiply_onto(const Matrix& matrix, const float* in) {
    multiply(matrix, in, all.product, [&](int64_t from, int64_t to) {
      MEGACPT_ON_ISA(all.isa, add(all.product + from, all.x + from, to - from));
    });
  }

  template <typename Then>
  void multiply(const Matrix& matrix, const float* in, float* out, const Then& then) {
    if (matrix.format == PACKED) order(matrix.packed(), in);
    share((matrix.rows + TILE - 1) / TILE, [&](int64_t first, int64_t last) {
      const int64_t from = first * TILE, to = std::min(last * TILE, matrix.rows);
      if (matrix.format == PACKED)
        packed_rows(matrix.packed(), out, first, last);
      else
        plain_rows(matrix, in, out, from, to);
      if (matrix.bias != nullptr) MEGACPT_ON_ISA(all.isa, add(matrix.bias + from, out + from, to - from));
      then(from, to);
    });
  }

  void order(const Packed& matrix, const float* in) {
    if (model.int8)
      MEGACPT_ON_ISA(all.isa, round_activations(in, matrix, rounded, 0, 1));
    else
      MEGACPT_ON_ISA(all.isa, order_activations(in, matrix, ordered, 0, 1));
  }

  void packed_rows(const Packed& matrix, float* out, int64_t first, int64_t last) {
    if (!model.int8) return MEGACPT_ON_ISA(all.isa, packed_float_rows(matrix, ordered, out, first, last));
#if defined(__x86_64__)
    if (all.isa == ISA_AVX512VNNI) return avx512vnni::packed_int8_rows(matrix, rounded, out, first, last);
#endif
    MEGACPT_ON_ISA(all.isa, packed_int8_rows(matrix, rounded, out, first, last));
  }

  void plain_rows(const Matrix& matrix, const float* in, float* out, int64_t from, int64_t to) {
    const int64_t rows = matrix.rows, columns = matrix.columns;
    if (matrix.format == FLOAT32) {
      const auto* const data = static_cast<const float*>(matrix.data);
      MEGACPT_ON_ISA(all.isa, float_rows(data, in, out, columns, from, to));
    } else if (matrix.format == BFLOAT16) {
      const auto* const data = static_cast<const BFloat16*>(matrix.data);
      MEGACPT_ON_ISA(all.isa, half_linear_rows(in, data, out, 1, rows, columns, from, to));
    } else {
      const auto* const data = static_cast<const Float16*>(matrix.data);
      MEGACPT_ON_ISA(all.isa, half_linear_rows(in, data, out, 1, rows, columns, from, to));
    }
  }

  Shared& all;
  const Model& model;
  Phase* phase;
  int64_t members;
  std::unique_ptr<float[]> memory;
  float *row, *scores;
  Ordered ordered;
  Rounded rounded;
};

}  // namespace

extern "C" MEGACPT_EXPORT void megacpt_decode(const Model* model, const Token* token, int threads, int isa) {
  Shared all(*model, *token, isa);
  // Phases need to know how many threads there are: those of OpenMP, or this one alone.
  if (threads <= 1 || GOMP_parallel == nullptr || omp_get_num_threads == nullptr) return Member(all, 1).run();
  const auto join = [](void* data) { Member(*static_cast<Shared*>(data), omp_get_num_threads()).run(); };
  GOMP_parallel(join, &all, static_cast<unsigned>(threads), 0);
}
