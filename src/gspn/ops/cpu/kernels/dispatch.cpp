// The instruction sets of this library, and the choice among them.
#include <atomic>
#include <cstring>

#include "interface.h"
#include "workers.h"

namespace gspn {

namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}

namespace {

// Those that this library was built with and this processor runs, the fastest first. `visit` returns whether to go on.
template <class Visit>
void for_each_instruction_set(Visit visit) {
#if defined(GSPN_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && !visit(avx512::kernels)) {
    return;
  }
#endif
#if defined(GSPN_HAS_AVX2)
  // Every processor with AVX2 and FMA converts half precision (F16C) too.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !visit(avx2::kernels)) return;
#endif
  visit(baseline::kernels);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load();
  if (!current) {
    for_each_instruction_set([&](const Kernels& fastest) {
      current = &fastest;
      return false;
    });
    chosen.store(current);
  }
  return *current;
}

}  // namespace gspn

using namespace gspn;

GSPN_EXPORT int32_t gspn_interface_version() { return kInterfaceVersion; }

// The name of the `index`-th instruction set that runs here, the fastest first; null beyond the last.
GSPN_EXPORT const char* gspn_instruction_set(int64_t index) {
  const char* name = nullptr;
  for_each_instruction_set([&](const Kernels& set) {
    if (index-- == 0) name = set.isa;
    return index >= 0;
  });
  return name;
}

GSPN_EXPORT const char* gspn_chosen_instruction_set() { return kernels().isa; }

// 0, or 1 if no instruction set of this name runs here. Calls that have begun finish with the one they began with.
GSPN_EXPORT int32_t gspn_choose_instruction_set(const char* name) {
  int32_t missing = 1;
  for_each_instruction_set([&](const Kernels& set) {
    if (std::strcmp(set.isa, name) != 0) return true;
    chosen.store(&set);
    missing = 0;
    return false;
  });
  return missing;
}

GSPN_EXPORT void gspn_use_parallel_region(void* gomp_parallel) {
  parallel_region = reinterpret_cast<ParallelRegion>(gomp_parallel);
}
