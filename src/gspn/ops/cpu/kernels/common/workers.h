// The threads of both operators, their scratch, and the memory of outputs.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "interface.h"

// glibc 2.34 gave these functions new versions, and keeps the old ones. A library that asks for the old ones runs with
// older systems than the one that it was built on.
#if defined(__GLIBC__) && defined(__x86_64__)
#define GSPN_OLDEST_VERSION(function) asm(".symver " #function ", " #function "@GLIBC_2.2.5")
#elif defined(__GLIBC__) && defined(__aarch64__)
#define GSPN_OLDEST_VERSION(function) asm(".symver " #function ", " #function "@GLIBC_2.17")
#else
#define GSPN_OLDEST_VERSION(function) static_assert(true, "")
#endif
GSPN_OLDEST_VERSION(pthread_create);
GSPN_OLDEST_VERSION(pthread_join);
GSPN_OLDEST_VERSION(pthread_key_create);
GSPN_OLDEST_VERSION(pthread_getspecific);
GSPN_OLDEST_VERSION(pthread_setspecific);

namespace gspn {

// Outputs are fresh memory. Where they are large, ask for huge pages before the first touch: 512 times fewer page
// faults, which otherwise take longer than the scan itself.
inline void expect_first_touch(void* data, int64_t size) {
  const auto bytes = static_cast<size_t>(size);
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
//
// Kept under a POSIX key and not in a thread_local, which needs the C++ library to be destroyed. Without that library
// the kernels run beside any, and on every glibc since 2.17.
class WorkerScratch {
 public:
  // Null if there is no memory for it.
  static WorkerScratch* of_this_thread() {
    if (!key.made) return nullptr;
    void* own = pthread_getspecific(key.id);
    if (!own && (own = std::calloc(1, sizeof(WorkerScratch))) && pthread_setspecific(key.id, own) != 0) {
      release(own);
      own = nullptr;
    }
    return static_cast<WorkerScratch*>(own);
  }
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      if (posix_memalign(&memory_, 4096, size_) != 0) memory_ = nullptr, size_ = 0;
      expect_first_touch(memory_, static_cast<int64_t>(size_));
    }
    return static_cast<char*>(memory_);
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
  // At the end of a thread.
  static void release(void* own) {
    std::free(static_cast<WorkerScratch*>(own)->memory_);
    std::free(own);
  }
  struct Key {
    pthread_key_t id;
    bool made;
    Key() : id(), made(pthread_key_create(&id, release) == 0) {}
  };
  inline static const Key key;

  void* memory_;
  size_t size_;
};

template <class Call, class Plan>
struct Team {
  const Kernel<Call, Plan>& kernel;
  const Call& call;
  const Plan& plan;
  int64_t items;
  size_t scratch_bytes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  static void work(void* self) {
    auto& team = *static_cast<Team*>(self);
    WorkerScratch* own = WorkerScratch::of_this_thread();
    char* scratch = own ? own->reserve(team.scratch_bytes) : nullptr;
    if (!own || (!scratch && team.scratch_bytes)) {
      team.failed = true;
      return;
    }
    for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.items;) {
      team.kernel.run(team.call, team.plan, i, scratch);
    }
    own->trim();
  }
};

// Threads that one call starts where there is no OpenMP, at most.
constexpr int64_t kMostStarted = 255;

// Runs the kernel for every item; false if memory ran out.
template <class Call, class Plan>
bool run(const Kernel<Call, Plan>& kernel, const Call& call, const Plan& plan, int64_t items, int64_t threads) {
  using ThisTeam = Team<Call, Plan>;
  ThisTeam team{kernel, call, plan, items, kernel.scratch_bytes ? kernel.scratch_bytes(call, plan) : 0};
  if (threads > items) threads = items;
  if (threads <= 1) {
    team.work(&team);
  } else if (const ParallelRegion region = parallel_region.load()) {
    region(&team.work, &team, static_cast<unsigned>(threads), 0);
  } else {
    pthread_t others[kMostStarted];
    const auto work = [](void* self) -> void* { return ThisTeam::work(self), nullptr; };
    int64_t started = 0;
    while (started < kMostStarted && started + 1 < threads &&
           pthread_create(&others[started], nullptr, work, &team) == 0) {
      ++started;  // Where the system gives no more, those that there are do it all.
    }
    team.work(&team);
    while (started) pthread_join(others[--started], nullptr);
  }
  return !team.failed;
}

// Memory for the length of a call; null where none is asked for, which is not a failure.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : data_(bytes ? std::malloc(static_cast<size_t>(bytes)) : nullptr), failed_(bytes && !data_) {}
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }
  bool failed() const { return failed_; }

 private:
  void* data_;
  bool failed_;
};

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

inline int64_t size_of(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
inline int64_t size_of_state(int32_t dtype) { return dtype == kFloat64 ? 8 : 4; }

// The result of an entry point. Nothing is computed after a refusal; library.py says each in words.
enum Status : int32_t {
  kDone = 0,
  kOutOfMemory = 1,
  kBadDType = 2,
  kBadDirection = 3,
  kBadSize = 4,  // below 1, or so large that a number of bytes would overflow
  kBadSegment = 5,
  kBadGroups = 6,
  kBadPointer = 7,  // null where something is needed, or present where nothing belongs
  kBadThreads = 8,
};

constexpr double kMostBytes = 0x1p60;

// All sizes are at least 1, and an image of them with a thousand bytes an element is a number that fits.
inline bool sizes_fit(std::initializer_list<int64_t> sizes) {
  double bytes = 1024;
  for (const int64_t size : sizes) {
    if (size < 1) return false;
    bytes *= static_cast<double>(size);
  }
  return bytes < kMostBytes;
}

// The address of every element is one that can be computed.
inline bool strides_fit(const Image& image, int64_t batch, int64_t channels, int64_t rows, int64_t columns) {
  const auto reach = [](int64_t size, int64_t stride) {
    return static_cast<double>(size) * (stride < 0 ? -1. : 1.) * static_cast<double>(stride);
  };
  return !image.data || 64 * (reach(batch, image.batch) + reach(channels, image.channel) + reach(rows, image.row) +
                              reach(columns, image.column)) <
                            kMostBytes;
}

inline bool all_present(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (!pointer) return false;
  }
  return true;
}

// The part of a call that both operators share.
inline Status check_common(int32_t dtype, int64_t channels, int64_t groups, int64_t segment, int64_t threads) {
  if (dtype < kFloat32 || dtype > kFloat16) return kBadDType;
  if (groups < 1 || groups > channels || channels % groups != 0) return kBadGroups;
  if (segment < 1 || static_cast<double>(segment) > kMostBytes) return kBadSegment;
  return threads < 1 || threads > (1 << 20) ? kBadThreads : kDone;
}

}  // namespace gspn
