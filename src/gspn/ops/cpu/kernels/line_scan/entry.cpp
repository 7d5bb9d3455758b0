// line_scan's entry points: cuts a call into items and spreads them over threads.
#include <algorithm>

#include "../common/workers.h"
#include "call.h"

namespace gspn {
namespace {

// Bytes of x, and of every output of its shape.
int64_t image_bytes(const LineScanCall& call) {
  return call.batch * call.channels * call.lines * call.cross * size_of(call.dtype);
}

// Channels of a group that one item takes, with shared taps. A constant, so that the tap gradients are summed in the
// same order on every machine; large enough that the partial sums stay below a tenth of a float32 x.
constexpr int64_t kSharedBlock = 32;

// Columns staged at a time: see kBand in transpose.h.
constexpr int64_t kTileColumns = 256;

LineScanPlan make_plan(const LineScanCall& call, int64_t vector_bytes, int64_t threads, bool backward) {
  LineScanPlan plan{};
  const int64_t state = size_of_state(call.dtype), lanes = vector_bytes / state;
  const bool shared = call.shared_taps();
  const int64_t per_group = call.channels / call.groups;

  const auto channels_last = [](const Image& image) { return !image.data || image.channel == 1; };
  plan.interleaved = call.channels > 1 && call.x.column != 1 && (!shared || per_group >= 8) &&
                     (backward ? channels_last(call.grad) && channels_last(call.h) : channels_last(call.x)) &&
                     channels_last(call.lam);

  const auto dense = [](const Image& image) { return !image.data || (image.row == 1 && image.column != 1); };
  plan.columns = !plan.interleaved && dense(call.x) && dense(call.lam) && dense(call.h) && dense(call.taps.image) &&
                 dense(call.grad) && dense(call.dx) && dense(call.dlam) && dense(call.dtaps.image);

  if (shared) {
    plan.block = std::min(per_group, kSharedBlock);
    plan.blocks = round_up(per_group, plan.block) / plan.block;
  } else if (plan.interleaved) {
    // As wide as keeps a few lines in the first-level cache and every thread at work.
    plan.block = 64;
    while (plan.block > 16 && (plan.block * call.cross > 8192 ||
                               call.batch * (round_up(call.channels, plan.block) / plan.block) < 2 * threads)) {
      plan.block /= 2;
    }
    plan.block = std::min(plan.block, call.channels);
    plan.blocks = round_up(call.channels, plan.block) / plan.block;
  } else {
    plan.block = 1;
    plan.blocks = call.channels;
  }

  const int64_t work = call.batch * plan.blocks * (shared ? call.groups : 1);
  plan.spans = 1;
  if (call.segments() > 1 && work < 4 * threads) {
    plan.spans = std::min(round_up(4 * threads, work) / work, call.segments());
  }
  plan.items = work * plan.spans;

  plan.pixels = call.lines * call.cross;

  const int64_t m = plan.interleaved ? plan.block : 1;
  plan.pitch = round_up(call.cross * m + 2 * m + lanes, lanes) + lanes;
  // A few lines, so that they stay in the first-level cache; of columns whole cache lines, and where they are staged
  // from dense rows as many as memory likes to deliver at once.
  plan.tile = std::max<int64_t>(65536 / (plan.pitch * state * 12), 1);
  if (!plan.interleaved) plan.tile = std::max<int64_t>(plan.tile, 64 / size_of(call.dtype));
  if (plan.columns) plan.tile = kTileColumns;
  plan.tile = std::min(plan.tile, call.lines);
  return plan;
}

// Before anything is divided, multiplied or read.
Status check(const LineScanCall* call, int64_t threads, bool backward) {
  if (!call) return kBadPointer;
  const LineScanCall& c = *call;
  if (!sizes_fit({c.batch, c.channels, c.lines, c.cross})) return kBadSize;
  for (const Image* image : {&c.x, &c.lam, &c.h, &c.grad, &c.dx, &c.dlam}) {
    if (!strides_fit(*image, c.batch, c.channels, c.lines, c.cross)) return kBadSize;
  }
  for (const Taps* taps : {&c.taps, &c.dtaps}) {
    const Image of_taps{taps->image.data, taps->tap, 0, 0, 0};
    if (!strides_fit(taps->image, c.batch, c.channels, c.lines, c.cross) || !strides_fit(of_taps, 3, 1, 1, 1)) {
      return kBadSize;
    }
  }
  if (const Status status = check_common(c.dtype, c.channels, c.groups, c.segment, threads)) return status;
  if (!all_present({c.h.data, c.taps.image.data})) return kBadPointer;
  const bool rest = backward ? all_present({c.grad.data, c.dx.data}) && (!c.dlam.data || (c.lam.data && c.x.data))
                             : c.x.data != nullptr;
  return rest ? kDone : kBadPointer;
}

}  // namespace
}  // namespace gspn

using namespace gspn;

// A Status.
GSPN_EXPORT int32_t gspn_line_scan(const LineScanCall* call, int64_t threads) {
  if (const Status status = check(call, threads, false)) return status;
  const Kernels& chosen = kernels();
  const LineScanPlan plan = make_plan(*call, chosen.vector_bytes, threads, false);
  expect_first_touch(call->h.data, image_bytes(*call));
  return run(chosen.line_scan_forward, *call, plan, plan.items, threads) ? kDone : kOutOfMemory;
}

GSPN_EXPORT int32_t gspn_line_scan_backward(const LineScanCall* call, int64_t threads) {
  if (const Status status = check(call, threads, true)) return status;
  const Kernels& chosen = kernels();
  LineScanPlan plan = make_plan(*call, chosen.vector_bytes, threads, true);
  expect_first_touch(call->dx.data, image_bytes(*call));
  expect_first_touch(call->dlam.data, image_bytes(*call));
  expect_first_touch(call->dtaps.image.data, image_bytes(*call) / call->channels * call->groups * 3);
  // The columns' sweep adds up a group's channels in memory, which has to be in the state's type.
  const bool half = size_of(call->dtype) == 2;
  const bool partial = call->shared_taps() && call->dtaps.image.data && (plan.blocks > 1 || (plan.columns && half));
  const int64_t sums = plan.blocks * call->batch * call->groups * 3 * plan.pixels;
  const Memory partials(partial ? sums * size_of_state(call->dtype) : 0);
  if (partials.failed()) return kOutOfMemory;
  plan.partials = partials.get();
  bool done = run(chosen.line_scan_backward, *call, plan, plan.items, threads);
  if (partial) done = done && run(chosen.line_scan_merge_taps, *call, plan, call->batch * call->groups, threads);
  return done ? kDone : kOutOfMemory;
}
