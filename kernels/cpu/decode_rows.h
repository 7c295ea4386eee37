// What a decoder computes for one token besides products with packed matrices, declared for every instruction set.
#pragma once

#include "numbers.h"

namespace megacpt {

// The queries that share a key, and what they read.
struct Attention {
  float* queries;       // [heads, width], rotated in place
  const float* key;     // [width] of the new token, not yet rotated
  const float* value;   // [width] of the new token
  float* keys;          // [capacity, width], of which `position` are filled
  float* values;        // the same
  float* out;           // [heads, width]
  float* scores;        // [position + 1], to work in
  int64_t heads, width, position;
};

// How queries and keys are prepared.
struct Turn {
  const float* cosines;     // [rotated], of this position
  const float* sines;       // [rotated], of the first half negative
  int64_t rotated;
  const float* query_norm;  // [width] or null
  const float* key_norm;    // [width] or null
  float epsilon;
};

#define MEGACPT_DECLARE_DECODE(isa)                                                                                  \
  namespace isa {                                                                                                    \
  void widen(const float* from, float* to, int64_t count);                                                           \
  void widen(const BFloat16* from, float* to, int64_t count);                                                        \
  void widen(const Float16* from, float* to, int64_t count);                                                         \
  void add(const float* x, float* to, int64_t count);                                                                \
  void rms_norm(const float* x, const float* weight, float* out, int64_t count, float epsilon);                      \
  void swiglu(const float* gate, const float* up, float* out, int64_t count);                                        \
  void attend(const Attention& attention, const Turn& turn);                                                         \
  void float_rows(const float* weight, const float* x, float* out, int64_t columns, int64_t from, int64_t to);       \
  }

MEGACPT_DECLARE_DECODE(baseline)
MEGACPT_DECLARE_DECODE(avx2)
MEGACPT_DECLARE_DECODE(avx512)

}  // namespace megacpt
