// propagate for one instruction set: compiled once for each, with GSPN_ISA naming the namespace and the entry table.
//
// Twelve tap maps, four lam, four u and a skip are functions of a proxy of a few channels. A block of as many channels as
// a vector has lanes is walked four times; at every pixel the maps are projected from the proxy into registers, used and
// forgotten. Arithmetic decides the speed, so a few pixels share the load of each projection vector, three sigmoids share
// one division (taps.h), and all layouts are turned to [pixel][lane] on their way into scratch.
#include "propagate_backward.h"
#include "propagate_forward.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

template <class Run>
void by_dtype(const PropagateCall& call, Run run) {
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

template <class A>
void exp2_of_all(const A* in, A* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store_some<A>(out + i, exp2_of<A>(load_some<A>(in + i, count - i)), count - i);
  }
}

}  // namespace

extern const PropagateKernels propagate_kernels;
const PropagateKernels propagate_kernels = {
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t block) {
      call.dtype == kFloat64 ? pack_block<double>(call, plan, block) : pack_block<float>(call, plan, block);
    },
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t item, char* scratch) {
      by_dtype(call, [&](auto type) { propagate_forward<decltype(type)>(call, plan, item, scratch); });
    },
    [](const PropagateCall& call, const PropagatePlan& plan, bool gradient, int64_t item, char* scratch) {
      const Image &from = gradient ? call.grad : call.x, &to = gradient ? call.dx : call.y;
      by_dtype(call, [&](auto type) { propagate_merge<decltype(type)>(call, plan, from, to, item, scratch); });
    },
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t item, char* scratch) {
      by_dtype(call, [&](auto type) { propagate_backward<decltype(type)>(call, plan, item, scratch); });
    },
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t batch) {
      call.dtype == kFloat64 ? merge_proxy<double>(call, plan, batch) : merge_proxy<float>(call, plan, batch);
    },
    [](const PropagateCall& call, const PropagatePlan& plan) {
      call.dtype == kFloat64 ? merge_weights<double>(call, plan) : merge_weights<float>(call, plan);
    },
    [](int32_t dtype, const void* in, void* out, int64_t count) {
      dtype == kFloat64 ? exp2_of_all(static_cast<const double*>(in), static_cast<double*>(out), count)
                        : exp2_of_all(static_cast<const float*>(in), static_cast<float*>(out), count);
    },
};

}  // namespace GSPN_ISA
}  // namespace gspn
