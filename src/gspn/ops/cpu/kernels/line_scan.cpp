// line_scan for one instruction set: compiled once for each, with GSPN_ISA naming the namespace and the entry table.
//
// The kernel's view of a line is [cross][m]: m channels that lie side by side in memory (channels_last), or m = 1. The
// neighbour at cross offset -1 or +1 is then m elements away. What can be walked in place is; anything else (half
// precision, columns as lines, taps of another layout than x) is staged a tile of a few lines at a time in scratch that
// stays in the caches: converted, transposed or gathered. No map is ever copied as a whole.
//
// Memory decides the speed (6 tensors forward, 12 backward), so the arithmetic is written plainly: the state lives in
// padded lines of scratch, and pixels at the ends of a line, which lack a neighbour, are computed again without it, so
// that nothing, not even a NaN, is multiplied by a zero that stands for "does not exist".
#include "backward.h"
#include "forward.h"
#include "line_scan.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

template <class T>
void reduce(const LineScanCall& call, const Plan& plan, int64_t index) {
  using A = typename StateOf<T>::type;
  const int64_t batch = index / call.groups, group = index % call.groups;
  const int64_t plane = call.lines * call.cross, stride = call.batch * call.groups * 3 * plane;
  for (int64_t k = 0; k < 3; ++k) {
    const A* parts = static_cast<const A*>(plan.partials) + (index * 3 + k) * plane;
    T* out = static_cast<T*>(call.dtaps.data) + batch * call.dtaps.batch + group * call.dtaps.group + k * call.dtaps.tap;
    const int64_t slow = plan.columns ? call.cross : call.lines, fast = plan.columns ? call.lines : call.cross;
    const int64_t slow_stride = plan.columns ? call.dtaps.cross : call.dtaps.line;
    const int64_t fast_stride = plan.columns ? call.dtaps.line : call.dtaps.cross;
    for (int64_t i = 0; i < slow; ++i) {
      for (int64_t j = 0; j < fast; ++j) {
        A sum = 0;
        for (int64_t block = 0; block < plan.blocks; ++block) sum += parts[block * stride + i * fast + j];
        out[i * slow_stride + j * fast_stride] = narrow<T>(sum);
      }
    }
  }
}

// --- The table of one instruction set ------------------------------------------------------------------------------------

template <class Run>
void by_dtype(const LineScanCall& call, Run run) {
  switch (call.dtype) {
    case kFloat32:
      return run(float{});
    case kFloat64:
      return run(double{});
    case kBFloat16:
      return run(bf16{});
    default:
      return run(f16{});
  }
}

}  // namespace

extern const PropagateKernels propagate_kernels;
extern const Kernels kernels;
const Kernels kernels = {
    GSPN_ISA_NAME, GSPN_VECTOR_BYTES,
    [](const LineScanCall& call, const Plan& plan, int64_t item, char* scratch) {
      by_dtype(call, [&](auto type) { forward<decltype(type)>(call, plan, item, scratch); });
    },
    [](const LineScanCall& call, const Plan& plan, int64_t item, char* scratch) {
      by_dtype(call, [&](auto type) { backward<decltype(type)>(call, plan, item, scratch); });
    },
    [](const LineScanCall& call, const Plan& plan, int64_t item) {
      by_dtype(call, [&](auto type) { reduce<decltype(type)>(call, plan, item); });
    },
    propagate_kernels,
};

}  // namespace GSPN_ISA
}  // namespace gspn
