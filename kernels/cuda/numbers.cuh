// The formats of numbers in memory, and the few functions of float32 that the kernels compute with.
#pragma once

#include <math.h>

#include "device.cuh"

namespace megacpt {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

constexpr float INFINITE = __builtin_huge_valf();

template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#ifdef __CUDACC__

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ int to_nearest(float x) { return __float2int_rn(x); }
__device__ __forceinline__ long long to_nearest(double x) { return __double2ll_rn(x); }

__device__ __forceinline__ float widened(Float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

__device__ __forceinline__ void narrow(float value, BFloat16& to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

__device__ __forceinline__ void narrow(float value, Float16& to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

#else

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline int to_nearest(float x) { return static_cast<int>(lrintf(x)); }
inline long long to_nearest(double x) { return llrint(x); }

inline float widened(Float16 value) {
  _Float16 half;
  memcpy(&half, &value, sizeof half);
  return half;
}

inline void narrow(float value, Float16& to) {
  const _Float16 half = static_cast<_Float16>(value);
  memcpy(&to, &half, sizeof half);
}

inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  to.bits = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#endif

// 32 bits of minus infinity.
__host__ __device__ constexpr uint32_t minus_infinity(float) { return 0xff800000u; }
__host__ __device__ constexpr uint32_t minus_infinity(BFloat16) { return 0xff80ff80u; }
__host__ __device__ constexpr uint32_t minus_infinity(Float16) { return 0xfc00fc00u; }

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(BFloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }

// Relative error 6e-8 |x|, so absolutely below 5e-8 for x <= 0; exp(-infinity) is 0.
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * 1.44269504088896341f); }

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp_fast(-x)); }

}  // namespace megacpt
