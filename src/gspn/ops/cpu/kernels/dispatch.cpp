// Chooses the instruction set, once, when the first kernel is asked for.
#include <cstdlib>
#include <cstring>

#include "interface.h"
#include "workers.h"

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

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace gspn

using namespace gspn;

GSPN_EXPORT int32_t gspn_interface_version() { return kInterfaceVersion; }

GSPN_EXPORT const char* gspn_isa() { return kernels().isa; }

GSPN_EXPORT void gspn_use_parallel_region(void* gomp_parallel) {
  parallel_region = reinterpret_cast<ParallelRegion>(gomp_parallel);
}
