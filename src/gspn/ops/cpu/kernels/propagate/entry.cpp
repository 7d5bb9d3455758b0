// propagate's entry points: cuts a call into items and spreads them over threads.
#include <algorithm>

#include "../common/workers.h"
#include "call.h"

namespace gspn {
namespace {

// Images of a block up to this size stay in scratch while it is walked: they are then read and written once, in place
// of once a direction. Two of them take what a second-level cache holds or a little more; beyond, they come from where
// x does.
constexpr int64_t kMostKept = int64_t{4} << 20;
// Where keeping x as well as y would take more than this part of x's size in scratch (few channels, many threads, large
// images), x is staged again for each direction. Small images are kept in any case.
constexpr int64_t kMostScratch = 12, kSmall = int64_t{512} << 10;
// A tile where not all is kept: rows that fit the second-level cache, and columns enough for whole cache lines of a row
// of x where its rows are dense.
constexpr int64_t kTileBytes = int64_t{256} << 10, kTileColumns = 16;

// The part of a plan that forward and backward share.
PropagatePlan make_plan(const PropagateCall& call, int64_t vector_bytes, int64_t threads) {
  PropagatePlan plan{};
  const int64_t state = size_of_state(call.dtype), lanes = vector_bytes / state, count = call.direction_count;
  plan.blocks = round_up(call.channels, lanes) / lanes;
  plan.shared = call.groups == 1 || call.channels / call.groups % lanes == 0;
  plan.items = call.batch * plan.blocks;
  plan.pixels = call.pixels();
  plan.separate = plan.items < threads;
  plan.spans = 1;
  const int64_t outputs = plan.shared ? 2 : 5, taps = plan.shared ? 3 * count : 0;
  plan.packed_size = round_up(((count * outputs + 1) * lanes + taps) * call.proxy_channels, lanes) + lanes;
  plan.weight_size = (count * outputs + 1 + taps) * call.proxy_channels * lanes;
  plan.fetch = call.pixels() * vector_bytes > kSmall;
  return plan;
}

void plan_forward(const PropagateCall& call, int64_t vector_bytes, int64_t threads, PropagatePlan& plan) {
  if (plan.separate) {
    plan.items *= call.direction_count;
    const int64_t segments = call.longest() / call.segment;
    if (segments > 1 && plan.items < 4 * threads) {
      plan.spans = std::min(round_up(4 * threads, plan.items) / plan.items, segments);
      plan.items *= plan.spans;
    }
  }
  const int64_t size = size_of(call.dtype), lanes = vector_bytes / size_of_state(call.dtype);
  const int64_t kept = call.pixels() * vector_bytes, x_bytes = call.batch * call.channels * call.pixels() * size;
  const int64_t workers = std::min(plan.items, threads);
  const bool state_type = size == size_of_state(call.dtype);
  const bool dense = call.y.column == 1 && call.y.row == call.width && call.y.channel == call.pixels();
  plan.y_in_place = dense && kept > kSmall && state_type;
  const int64_t images = plan.y_in_place && call.channels % lanes == 0 ? 1 : 2;
  plan.keep_y = !plan.separate && kept <= kMostKept;
  plan.keep_x = plan.keep_y && (kept <= kSmall || kept * images * workers * kMostScratch <= x_bytes);
  plan.y_in_place = plan.y_in_place && plan.keep_x;
  plan.fetch = !plan.keep_x;
  plan.direct = !plan.separate && kept > kSmall && call.x.channel == 1 && call.y.channel == 1 && state_type;
  const auto lines_of = [&](int64_t cross, int64_t count, int64_t least) {
    return std::min(std::max(kTileBytes / (cross * vector_bytes), least), count);
  };
  plan.row_tile = lines_of(call.width, call.height, 1);
  plan.column_tile = lines_of(call.height, call.width, call.x.channel == 1 ? 2 : kTileColumns);
}

void plan_backward(const PropagateCall& call, int64_t threads, PropagatePlan& plan) {
  // Enough chunks for every thread and some to spare; each costs a gradient of the proxy.
  plan.chunks = std::min(round_up(2 * threads, call.batch) / call.batch, plan.blocks);
  if (plan.separate) plan.chunks = plan.blocks * call.direction_count;
  plan.items = call.batch * plan.chunks;
}

// Bytes of the images of all blocks, once for each direction.
int64_t parts_bytes(const PropagateCall& call, const PropagatePlan& plan, int64_t vector_bytes) {
  return plan.separate ? call.direction_count * call.batch * plan.blocks * plan.pixels * vector_bytes : 0;
}

// Before anything is divided, multiplied or read.
Status check(const PropagateCall* call, int64_t threads, bool backward) {
  if (!call) return kBadPointer;
  const PropagateCall& c = *call;
  if (!sizes_fit({c.batch, c.channels, c.proxy_channels, c.height, c.width}) ||
      c.proxy_row < c.width * c.proxy_channels || !sizes_fit({c.batch, c.channels, c.height, c.proxy_row}) ||
      c.proxy_image < c.height * c.proxy_row || !sizes_fit({c.batch, c.channels, c.proxy_image})) {
    return kBadSize;
  }
  for (const Image* image : {&c.x, &c.y, &c.grad, &c.dx}) {
    if (!strides_fit(*image, c.batch, c.channels, c.height, c.width)) return kBadSize;
  }
  if (c.direction_count < 1 || c.direction_count > 4) return kBadDirection;
  for (int d = 0; d < c.direction_count; ++d) {
    if (c.directions[d] < kDown || c.directions[d] > kLeft) return kBadDirection;
  }
  if (const Status status = check_common(c.dtype, c.channels, c.groups, c.segment, threads)) return status;
  if (!all_present({c.x.data, c.proxy, c.tap_proj, c.lam_proj, c.u_proj})) return kBadPointer;
  const bool outputs = backward
                           ? all_present({c.grad.data, c.dx.data, c.dproxy, c.dtap_proj, c.dlam_proj, c.du_proj}) &&
                                 !c.skip_proj == !c.dskip_proj
                           : c.y.data && !c.dx.data;
  return outputs ? kDone : kBadPointer;
}

int64_t image_bytes(const PropagateCall& call) {
  return call.batch * call.channels * call.pixels() * size_of(call.dtype);
}

}  // namespace
}  // namespace gspn

using namespace gspn;

// A Status.
GSPN_EXPORT int32_t gspn_propagate(const PropagateCall* call, int64_t threads) {
  if (const Status status = check(call, threads, false)) return status;
  const Kernels& chosen = kernels();
  PropagatePlan plan = make_plan(*call, chosen.vector_bytes, threads);
  plan_forward(*call, chosen.vector_bytes, threads, plan);
  const Memory packed(plan.blocks * plan.packed_size * size_of_state(call->dtype));
  const Memory parts(parts_bytes(*call, plan, chosen.vector_bytes));
  if (packed.failed() || parts.failed()) return kOutOfMemory;
  plan.packed = packed.get(), plan.parts = parts.get();
  expect_first_touch(call->y.data, image_bytes(*call));
  const auto done = [&](const PropagateKernel& kernel, int64_t items) {
    return run(kernel, *call, plan, items, threads);
  };
  return done(chosen.propagate_pack, plan.blocks) && done(chosen.propagate_forward, plan.items) &&
                 (!plan.separate || done(chosen.propagate_merge_directions, call->batch * plan.blocks))
             ? kDone
             : kOutOfMemory;
}

GSPN_EXPORT int32_t gspn_propagate_backward(const PropagateCall* call, int64_t threads) {
  if (const Status status = check(call, threads, true)) return status;
  const Kernels& chosen = kernels();
  const int64_t state = size_of_state(call->dtype);
  PropagatePlan plan = make_plan(*call, chosen.vector_bytes, threads);
  plan_backward(*call, threads, plan);
  const Memory packed(plan.blocks * plan.packed_size * state);
  const Memory weights(call->batch * plan.blocks * plan.weight_size * state);
  const Memory proxies(plan.chunks > 1 ? plan.chunks * call->batch * call->proxy_image * state : 0);
  const Memory parts(parts_bytes(*call, plan, chosen.vector_bytes));
  if (packed.failed() || weights.failed() || proxies.failed() || parts.failed()) return kOutOfMemory;
  plan.packed = packed.get(), plan.weight_parts = weights.get(), plan.parts = parts.get();
  plan.proxy_parts = plan.chunks > 1 ? proxies.get() : call->dproxy;
  expect_first_touch(call->dx.data, image_bytes(*call));
  const auto done = [&](const PropagateKernel& kernel, int64_t items) {
    return run(kernel, *call, plan, items, threads);
  };
  return done(chosen.propagate_pack, plan.blocks) && done(chosen.propagate_backward, plan.items) &&
                 (plan.chunks == 1 || done(chosen.propagate_merge_proxy, call->batch)) &&
                 (!plan.separate || done(chosen.propagate_merge_directions, call->batch * plan.blocks)) &&
                 done(chosen.propagate_merge_weights, 1)
             ? kDone
             : kOutOfMemory;
}

// The powers of two inside the taps, float32 (dtype 0) or float64 (1), for tests of their error.
GSPN_EXPORT void gspn_exp2(int32_t dtype, const void* in, void* out, int64_t count) {
  kernels().exp2(dtype, in, out, count);
}

// For memory that Python gives and fills: see expect_first_touch.
GSPN_EXPORT void gspn_expect_first_touch(void* data, int64_t bytes) { expect_first_touch(data, bytes); }
