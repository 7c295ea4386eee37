// Tensor cores and copies that a block need not wait for, as the product with packed matrices uses them. Without nvcc, a
// warp's threads hand each other their registers, and copies are made at once.
#pragma once

#include "rows.cuh"

namespace megacpt {

#ifdef __CUDACC__

// c += a b for a [16, 16] and b [16, 8] of bfloat16, and c [16, 8] of float32, spread over a warp as PTX has it.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void begin_copy(void* to, const void* from, bool there) {
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies of this thread but the last `PENDING`.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#else

inline float bfloat16_at(uint64_t bits, int place) {
  return widened(BFloat16{static_cast<uint16_t>(bits >> 16 * place)});
}

// Of lane 4 r + t: a0, a1 hold rows r and r + 8, columns 2 t and 2 t + 1; a2, a3 the same 8 columns further. b0, b1 hold
// rows 2 t and 2 t + 1 of column r, and the same 8 rows further. c holds rows r (two numbers) and r + 8 of columns 2 t, ...
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint64_t first[32], second[32], third[32];
  memcpy(first, emulated::exchanged(a[0] | static_cast<uint64_t>(a[2]) << 32), sizeof first);
  memcpy(second, emulated::exchanged(a[1] | static_cast<uint64_t>(a[3]) << 32), sizeof second);
  memcpy(third, emulated::exchanged(b0 | static_cast<uint64_t>(b1) << 32), sizeof third);
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  for (int n = 0; n < 4; ++n)
    for (int k = 0; k < 16; ++k) {
      const int thread = k % 8 / 2, place = k / 8 * 2 + k % 2;
      const uint64_t weights = (n < 2 ? first : second)[row * 4 + thread];
      c[n] += bfloat16_at(weights, place) * bfloat16_at(third[(column + n % 2) * 4 + thread], place);
    }
}

inline void begin_copy(void* to, const void* from, bool there) {
  if (there)
    memcpy(to, from, 16);
  else
    memset(to, 0, 16);
}

inline void close_copies() {}

template <int PENDING>
inline void await_copies() {}

#endif

}  // namespace megacpt
