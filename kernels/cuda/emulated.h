// CUDA's threads on one thread of a CPU: each is a coroutine that runs until it has to wait for others. Slow, and blind to
// races between threads that run at once, but it executes every line, shuffle and barrier of the kernels as written.
#pragma once

#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <tuple>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define MEGACPT_SHARED(name) unsigned char* const name = ::megacpt::emulated::self->block->shared.data()
#define threadIdx (::megacpt::emulated::self->place)
#define blockIdx (::megacpt::emulated::self->block->place)
#define blockDim (::megacpt::emulated::shape.threads)
#define gridDim (::megacpt::emulated::shape.blocks)

using cudaStream_t = void*;

struct uint4 {
  uint32_t x, y, z, w;
};

namespace megacpt {
namespace emulated {

struct Place {
  unsigned x;
};

struct Barrier {
  int members = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];  // two, so that one barrier an exchange is enough
};

struct Block {
  Place place;
  Barrier barrier;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
};

struct Thread {
  Place place;
  Block* block;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned exchanges = 0;
  bool done = false;
  Warp& warp() { return block->warps[place.x / 32]; }
};

struct Shape {
  Place blocks, threads;
};

inline Thread* self = nullptr;
inline Shape shape;
inline ucontext_t scheduler;
inline void (*body)(void*) = nullptr;
inline void* body_data = nullptr;

inline void yield() { swapcontext(&self->context, &scheduler); }

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

// Gives `value` to the warp; returns the values of all its threads.
template <typename Value>
inline uint64_t* exchanged(Value value) {
  uint64_t* values = self->warp().values[self->exchanges++ % 2];
  values[self->place.x % 32] = 0;
  memcpy(&values[self->place.x % 32], &value, sizeof value);
  wait(self->warp().barrier);
  return values;
}

inline void enter() {
  body(body_data);
  self->done = true;
  yield();
}

// Runs all threads of all blocks, in one order and then the other, until all are done.
inline void run(int blocks, int threads, size_t shared) {
  constexpr size_t STACK = 1 << 15;
  std::vector<Block> grid(blocks);
  std::vector<Thread> all(static_cast<size_t>(blocks) * threads);
  shape = {{static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}};
  for (size_t i = 0; i < all.size(); ++i) {
    Block& block = grid[i / threads];
    if (i % threads == 0) {
      block.place.x = static_cast<unsigned>(i / threads);
      block.barrier.members = threads;
      block.shared.assign(shared + 16, 0xa5);  // a kernel must not rely on zeros
      block.warps.resize((threads + 31) / 32);
    }
    all[i].place.x = static_cast<unsigned>(i % threads);
    all[i].block = &block;
    ++all[i].warp().barrier.members;
    all[i].stack.reset(new char[STACK]);
    getcontext(&all[i].context);
    all[i].context.uc_stack.ss_sp = all[i].stack.get();
    all[i].context.uc_stack.ss_size = STACK;
    all[i].context.uc_link = nullptr;
    makecontext(&all[i].context, enter, 0);
  }
  bool forward = true;
  for (size_t left = all.size(); left > 0; forward = !forward)
    for (size_t n = 0; n < all.size(); ++n) {
      self = &all[forward ? n : all.size() - 1 - n];
      if (self->done) continue;
      swapcontext(&scheduler, &self->context);
      left -= self->done;
    }
  self = nullptr;
}

}  // namespace emulated

template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int, size_t) {
  return 3;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, cudaStream_t, bool, Parameters... values) {
  auto call = std::make_tuple(kernel, values...);
  using Call = decltype(call);
  emulated::body = [](void* data) {
    std::apply([](auto function, auto... parameters) { function(parameters...); }, *static_cast<Call*>(data));
  };
  emulated::body_data = &call;
  emulated::run(blocks, threads, shared);
  return 0;
}

inline void pause() { emulated::yield(); }

}  // namespace megacpt

inline void __syncthreads() { megacpt::emulated::wait(megacpt::emulated::self->block->barrier); }
inline void __syncwarp() { megacpt::emulated::wait(megacpt::emulated::self->warp().barrier); }
inline void __threadfence() {}

template <typename Value>
inline Value __shfl_sync(unsigned, Value value, int lane) {
  Value result;
  memcpy(&result, &megacpt::emulated::exchanged(value)[lane], sizeof result);
  return result;
}

template <typename Value>
inline Value __shfl_xor_sync(unsigned, Value value, int mask) {
  Value result;
  memcpy(&result, &megacpt::emulated::exchanged(value)[(threadIdx.x % 32) ^ mask], sizeof result);
  return result;
}

template <typename Value>
inline Value __shfl_up_sync(unsigned, Value value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  Value result;
  memcpy(&result, &megacpt::emulated::exchanged(value)[lane < distance ? lane : lane - distance], sizeof result);
  return result;
}

inline unsigned __match_any_sync(unsigned, int value) {
  const uint64_t* values = megacpt::emulated::exchanged(value);
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) same |= static_cast<unsigned>(static_cast<int>(values[lane]) == value) << lane;
  return same;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename Value>
inline Value atomicAdd(Value* to, Value value) {
  const Value before = *to;
  *to += value;
  return before;
}

template <typename Value>
inline Value __ldcg(const Value* from) {
  return *from;
}
