// The entry points: chooses the instruction set and the plan, and spreads the items over threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "line_scan.h"

namespace gspn {

#if defined(GSPN_HAS_AVX512)
namespace avx512 {
extern const Kernels kernels;
}
#endif
#if defined(GSPN_HAS_AVX2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

namespace {

// The best instruction set of this processor; GSPN_ISA=avx2 or baseline lowers it, for tests and measurements.
const Kernels& choose_kernels() {
  const char* wish = std::getenv("GSPN_ISA");
  const auto allowed = [&](const char* name) { return !wish || !*wish || std::strcmp(wish, name) == 0; };
#if defined(GSPN_HAS_AVX512)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512::kernels;
  }
#endif
#if defined(GSPN_HAS_AVX2)
  // Every processor with AVX2 and FMA converts half precision (F16C) too.
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::kernels;
  }
#endif
  (void)allowed;
  return baseline::kernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// GOMP_parallel of the OpenMP runtime that PyTorch uses, if it could be found: its threads then are ours too. A runtime
// of our own would keep a second team of threads, and each team's idle threads spin on the cores the other one needs.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<ParallelRegion> parallel_region{nullptr};

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

thread_local WorkerScratch worker_scratch;

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

// Outputs are fresh memory. Where they are large, ask for huge pages before the first touch: 512 times fewer page faults,
// which otherwise take longer than the scan itself.
void expect_first_touch(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (data && bytes >= 2 * huge && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

size_t size_of(int32_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
size_t size_of_state(int32_t dtype) { return dtype == kFloat64 ? 8 : 4; }

// Bytes of x, and of every output of its shape.
size_t map_bytes(const LineScanCall& call) {
  return static_cast<size_t>(call.batch * call.channels * call.lines * call.cross) * size_of(call.dtype);
}

// Channels of a group that one item takes, with shared taps. A constant, so that the tap gradients are summed in the
// same order on every machine; large enough that the partial sums stay below a tenth of a float32 x.
constexpr int64_t kSharedBlock = 32;

// Columns staged at a time: see kBand in staging.h.
constexpr int64_t kTileColumns = 256;

Plan plan(const LineScanCall& call, int64_t threads, bool backward) {
  Plan plan{};
  const size_t state = size_of_state(call.dtype);
  const bool shared = call.groups != call.channels;
  const int64_t per_group = call.channels / call.groups;
  const int64_t lanes = kernels().vector_bytes / static_cast<int64_t>(state);

  const auto channels_last = [](const Map& map) { return !map.data || map.channel == 1; };
  plan.interleaved = call.channels > 1 && call.x.cross != 1 && (!shared || per_group >= 8) &&
                     (backward ? channels_last(call.grad) && channels_last(call.h) : channels_last(call.x)) &&
                     channels_last(call.lam);

  const auto dense_rows = [](const auto& map) { return !map.data || (map.line == 1 && map.cross != 1); };
  plan.columns = !plan.interleaved && dense_rows(call.taps) && dense_rows(call.lam) &&
                 (backward ? dense_rows(call.grad) && dense_rows(call.dx) && dense_rows(call.x) && dense_rows(call.h) &&
                                 dense_rows(call.dlam) && dense_rows(call.dtaps)
                           : dense_rows(call.x) && dense_rows(call.h));

  if (shared) {
    plan.block = per_group < kSharedBlock ? per_group : kSharedBlock;
    plan.blocks = round_up(per_group, plan.block) / plan.block;
  } else if (plan.interleaved) {
    // As wide as keeps a few lines in the first-level cache and every thread at work.
    plan.block = 64;
    while (plan.block > 16 && (plan.block * call.cross > 8192 ||
                               call.batch * (round_up(call.channels, plan.block) / plan.block) < 2 * threads)) {
      plan.block /= 2;
    }
    if (plan.block > call.channels) plan.block = call.channels;
    plan.blocks = round_up(call.channels, plan.block) / plan.block;
  } else {
    plan.block = 1;
    plan.blocks = call.channels;
  }

  const int64_t segments = round_up(call.lines, call.segment) / call.segment;
  const int64_t work = call.batch * plan.blocks * (shared ? call.groups : 1);
  plan.spans = 1;
  if (segments > 1 && work < 4 * threads) {
    plan.spans = round_up(4 * threads, work) / work;
    if (plan.spans > segments) plan.spans = segments;
  }
  plan.items = work * plan.spans;

  const int64_t m = plan.interleaved ? plan.block : 1;
  const int64_t n = call.cross * m;
  plan.pitch = round_up(n + 2 * m + lanes, lanes) + lanes;
  // A few lines, so that they stay in the first-level cache; of columns whole cache lines, and where they are staged from
  // dense rows as many as memory likes to deliver at once.
  plan.tile = 65536 / (plan.pitch * static_cast<int64_t>(state) * 12);
  if (plan.columns) {
    plan.tile = kTileColumns;
  } else if (!plan.interleaved && plan.tile < 64 / static_cast<int64_t>(size_of(call.dtype))) {
    plan.tile = 64 / static_cast<int64_t>(size_of(call.dtype));
  }
  if (plan.tile < 1) plan.tile = 1;
  if (plan.tile > call.lines) plan.tile = call.lines;

  const int64_t channel_lines = plan.interleaved ? 1 : plan.block;
  const int64_t arrays = plan.columns ? 4 : backward ? 12 : 6;
  const int64_t kept = backward ? 3 + channel_lines : 2 * channel_lines;
  // And one mask element a staged column; every piece begins at a cache line.
  plan.scratch_bytes = static_cast<size_t>((arrays * plan.tile + kept) * plan.pitch + plan.tile + lanes) * state +
                       static_cast<size_t>(64 * (arrays + kept + 4));
  return plan;
}

}  // namespace
}  // namespace gspn

using namespace gspn;

GSPN_EXPORT int32_t gspn_interface_version() { return kInterfaceVersion; }

GSPN_EXPORT const char* gspn_isa() { return kernels().isa; }

GSPN_EXPORT void gspn_use_parallel_region(void* gomp_parallel) {
  parallel_region = reinterpret_cast<ParallelRegion>(gomp_parallel);
}

// 0, or 1 if memory ran out.
GSPN_EXPORT int32_t gspn_line_scan(const LineScanCall* call, int64_t threads) {
  const Plan p = plan(*call, threads, false);
  expect_first_touch(call->h.data, map_bytes(*call));
  const bool done = run(p.items, p.scratch_bytes, threads,
                        [&](int64_t item, char* scratch) { kernels().forward(*call, p, item, scratch); });
  return done ? 0 : 1;
}

GSPN_EXPORT int32_t gspn_line_scan_backward(const LineScanCall* call, int64_t threads) {
  Plan p = plan(*call, threads, true);
  const bool shared = call->groups != call->channels;
  expect_first_touch(call->dx.data, map_bytes(*call));
  expect_first_touch(call->dlam.data, map_bytes(*call));
  expect_first_touch(call->dtaps.data, map_bytes(*call) / static_cast<size_t>(call->channels / call->groups) * 3);
  // The columns' sweep adds up a group's channels in memory, which has to be in the state's type.
  const bool narrow = call->dtype == kBFloat16 || call->dtype == kFloat16;
  if (shared && call->dtaps.data && (p.blocks > 1 || (p.columns && narrow))) {
    const size_t count = static_cast<size_t>(p.blocks * call->batch * call->groups * 3 * call->lines * call->cross);
    p.partials = std::malloc(count * size_of_state(call->dtype));
    if (!p.partials) return 1;
  }
  bool done = run(p.items, p.scratch_bytes, threads,
                  [&](int64_t item, char* scratch) { kernels().backward(*call, p, item, scratch); });
  if (done && p.partials) {
    done = run(call->batch * call->groups, 0, threads, [&](int64_t item, char*) { kernels().reduce(*call, p, item); });
  }
  std::free(p.partials);
  return done ? 0 : 1;
}
