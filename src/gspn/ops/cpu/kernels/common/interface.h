// The part of the C interface that both operators share. No Python, no torch: one binary serves every version of both.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define GSPN_EXPORT extern "C" __declspec(dllexport)
#else
#define GSPN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Functions that are compiled for several instruction sets have to be inlined, or live in the namespace of one: of
// several copies of a function the linker would be free to keep the AVX-512 one for the baseline as well.
#define GSPN_INLINE inline __attribute__((always_inline))

namespace gspn {

// The Python side mirrors the structs of the C interface field by field; this number guards them.
constexpr int32_t kInterfaceVersion = 6;

enum DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// A tensor [batch, channel, row, column] wherever its elements are. Strides count elements.
struct Image {
  void* data;  // null: absent
  int64_t batch, channel, row, column;
};

// The extent of an image that lies in the first rows and columns of a map: any number that was asked for, within it.
GSPN_INLINE int64_t extent_within(int64_t asked, int64_t map) { return asked < 0 ? 0 : asked < map ? asked : map; }

struct LineScanCall;
struct LineScanPlan;
struct PropagateCall;
struct PropagatePlan;

// A function that the threads run for every item of work, each on its own.
template <class Call, class Plan>
struct Kernel {
  void (*run)(const Call&, const Plan&, int64_t item, char* scratch);
  size_t (*scratch_bytes)(const Call&, const Plan&);  // that each worker needs
};
using LineScanKernel = Kernel<LineScanCall, LineScanPlan>;
using PropagateKernel = Kernel<PropagateCall, PropagatePlan>;

// The kernels of one instruction set. Behind each is what an item is.
struct Kernels {
  const char* isa;
  int64_t vector_bytes;
  const LineScanKernel& line_scan_forward;            // an item of the plan
  const LineScanKernel& line_scan_backward;           // an item of the plan
  const LineScanKernel& line_scan_merge_taps;         // (batch, group): adds up the partial tap gradients
  const PropagateKernel& propagate_pack;              // block: its projections in the order in which they are read
  const PropagateKernel& propagate_forward;           // an item of the plan
  const PropagateKernel& propagate_backward;          // an item of the plan
  const PropagateKernel& propagate_merge_directions;  // (batch, block): adds up directions computed separately
  const PropagateKernel& propagate_merge_proxy;       // batch: adds up the parts of the proxy's gradient
  const PropagateKernel& propagate_merge_weights;     // one for all: adds up the parts of the projections' gradients
  void (*exp2)(int32_t dtype, const void* in, void* out, int64_t count);  // of the taps, for tests of its error
};

// Those of the chosen instruction set, at first the fastest of this processor. A call asks once and keeps to them.
const Kernels& kernels();

}  // namespace gspn
