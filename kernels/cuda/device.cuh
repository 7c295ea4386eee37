// The little of the CUDA runtime that the kernels need. Without nvcc, emulated.h stands in for it: the same kernels then
// run on a CPU, thread by thread, which is how their logic is tested where there is no GPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define MEGACPT_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace megacpt {

// How many blocks of a kernel the whole device holds at once; 0 if it can't be said.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared) {
  int device = 0, processors = 0, each = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  return processors * each;
}

// Launches a kernel; `together`: all of its blocks run at once, so that they may wait for each other. Returns an error code.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, cudaStream_t stream, bool together,
           Parameters... values) {
  void* arguments[] = {&values...};
  const void* function = reinterpret_cast<const void*>(kernel);
  return together ? cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(threads), arguments, shared, stream)
                  : cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared, stream);
}

__device__ inline void pause() {}

}  // namespace megacpt

#else
#include "emulated.h"
#endif

#define MEGACPT_EXPORT extern "C" __attribute__((visibility("default")))

namespace megacpt {

constexpr unsigned WARP = 0xffffffffu;

// All blocks of a launch wait here for each other. `arrived` grows by one a block; `round` counts the barriers from 1 on.
__device__ inline void grid_barrier(unsigned long long* arrived, int round) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1ull);
    const unsigned long long wanted = static_cast<unsigned long long>(round) * gridDim.x;
    while (*static_cast<volatile unsigned long long*>(arrived) < wanted) pause();
    __threadfence();
  }
  __syncthreads();
}

}  // namespace megacpt
