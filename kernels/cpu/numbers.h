// The formats of numbers that kernels read and write besides float.
#pragma once

#include <stdint.h>

namespace megacpt {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace megacpt
