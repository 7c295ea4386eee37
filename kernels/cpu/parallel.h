// Work shared out among threads, on the pool that torch already has where there is one.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

// The entry of every OpenMP runtime on Linux (GNU, LLVM, Intel). torch loads one for all to see; taking part in its pool
// costs microseconds, while threads of our own would contend with its workers, which spin for a while after each op.
// Weak: without it, threads are started for the call.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));

namespace megacpt {

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 15;  // below this, another thread costs more than it brings

// Calls work(from, to) for pieces that cover [0, count), `weight` elements each, on up to `threads` threads. Which thread
// takes which piece is not fixed, so `work` must not depend on it.
template <typename Work>
void parallel_over(int64_t count, int64_t weight, int threads, const Work& work) {
  const int64_t useful = std::max<int64_t>(1, count * weight / ELEMENTS_PER_THREAD);
  const int64_t team = std::min<int64_t>({static_cast<int64_t>(std::max(threads, 1)), useful, count});
  if (team <= 1) {
    if (count > 0) work(0, count);
    return;
  }
  struct Shared {
    const Work& work;
    int64_t count, pieces;
    std::atomic<int64_t> next;
  } shared{work, count, std::min(count, 4 * team), {0}};  // smaller pieces even out threads that are held up
  const auto take = [](void* data) {
    Shared& all = *static_cast<Shared*>(data);
    for (int64_t piece; (piece = all.next.fetch_add(1)) < all.pieces;)
      all.work(all.count * piece / all.pieces, all.count * (piece + 1) / all.pieces);
  };
  if (GOMP_parallel != nullptr) {
    GOMP_parallel(take, &shared, static_cast<unsigned>(team), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int64_t helper = 1; helper < team; ++helper) helpers.emplace_back(take, &shared);
  take(&shared);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace megacpt
