// What both operators' entry points share: the threads, their scratch, and the memory of outputs.
#pragma once

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "interface.h"

namespace gspn {

// Outputs are fresh memory. Where they are large, ask for huge pages before the first touch: 512 times fewer page faults,
// which otherwise take longer than the scan itself.
inline void expect_first_touch(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (data && bytes >= 2 * huge && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// GOMP_parallel of the OpenMP runtime that PyTorch uses, if it could be found: its threads then are ours too. A runtime
// of our own would keep a second team of threads, and each team's idle threads spin on the cores the other one needs.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline std::atomic<ParallelRegion> parallel_region{nullptr};

// Scratch that a worker keeps between calls: fresh pages for every call would cost more than a small scan.
class WorkerScratch {
 public:
  ~WorkerScratch() { std::free(memory_); }
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<char*>(std::aligned_alloc(4096, size_));
      if (!memory_) size_ = 0;
      expect_first_touch(memory_, size_);
    }
    return memory_;
  }
  // Large scratch is given back, so that one big scan does not hold its memory for ever.
  void trim() {
    if (size_ > (size_t{8} << 20)) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
    }
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

inline thread_local WorkerScratch worker_scratch;

template <class Body>
struct Team {
  Body& body;
  int64_t items;
  size_t scratch_bytes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  static void work(void* self) {
    auto& team = *static_cast<Team*>(self);
    char* scratch = worker_scratch.reserve(team.scratch_bytes);
    if (!scratch && team.scratch_bytes) {
      team.failed = true;
      return;
    }
    for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.items;) team.body(i, scratch);
    worker_scratch.trim();
  }
};

// Runs body(item, scratch) for every item; false if memory ran out.
template <class Body>
bool run(int64_t items, size_t scratch_bytes, int64_t threads, Body body) {
  Team<Body> team{body, items, scratch_bytes};
  if (threads > items) threads = items;
  if (threads <= 1) {
    Team<Body>::work(&team);
  } else if (const ParallelRegion region = parallel_region.load()) {
    region(&Team<Body>::work, &team, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(&Team<Body>::work, &team);
    Team<Body>::work(&team);
    for (auto& thread : others) thread.join();
  }
  return !team.failed;
}

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

inline size_t size_of(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
inline size_t size_of_state(int32_t dtype) { return dtype == kFloat64 ? 8 : 4; }

}  // namespace gspn
