// What both operators' C interfaces share. No Python, no torch: one binary serves every version of both.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define GSPN_EXPORT extern "C" __declspec(dllexport)
#else
#define GSPN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace gspn {

enum DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int32_t kInterfaceVersion = 3;

struct LineScanCall;
struct Plan;
struct PropagateCall;
struct PropagatePlan;

struct PropagateKernels {
  // The projections of one block, as the kernels read them.
  void (*pack)(const PropagateCall&, const PropagatePlan&, int64_t block);
  void (*forward)(const PropagateCall&, const PropagatePlan&, int64_t item, char* scratch);
  // Adds up the directions of one block of one batch entry, where they were computed apart, to y or dx.
  void (*merge)(const PropagateCall&, const PropagatePlan&, bool gradient, int64_t item, char* scratch);
  void (*backward)(const PropagateCall&, const PropagatePlan&, int64_t item, char* scratch);
  // Adds up the parts of one batch entry's proxy gradient, where there are several.
  void (*merge_proxy)(const PropagateCall&, const PropagatePlan&, int64_t batch);
  // Adds up the parts of all projections' gradients.
  void (*merge_weights)(const PropagateCall&, const PropagatePlan&);
  // Powers of two, for tests of their error.
  void (*exp2)(int32_t dtype, const void* in, void* out, int64_t count);
};

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  int64_t vector_bytes;
  void (*forward)(const LineScanCall&, const Plan&, int64_t item, char* scratch);
  void (*backward)(const LineScanCall&, const Plan&, int64_t item, char* scratch);
  // Adds up the partial tap gradients of one (batch, group).
  void (*reduce)(const LineScanCall&, const Plan&, int64_t item);
  const PropagateKernels& propagate;
};

// Those of the chosen instruction set, at first the fastest of this processor. A call asks once and keeps to them.
const Kernels& kernels();

}  // namespace gspn
