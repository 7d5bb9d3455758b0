// line_scan's entry points: cuts a call into items and spreads them over threads.
#include "line_scan.h"
#include "workers.h"

namespace gspn {
namespace {

// Bytes of x, and of every output of its shape.
size_t map_bytes(const LineScanCall& call) {
  return static_cast<size_t>(call.batch * call.channels * call.lines * call.cross) * size_of(call.dtype);
}

// Channels of a group that one item takes, with shared taps. A constant, so that the tap gradients are summed in the
// same order on every machine; large enough that the partial sums stay below a tenth of a float32 x.
constexpr int64_t kSharedBlock = 32;

// Columns staged at a time: see kBand in staging.h.
constexpr int64_t kTileColumns = 256;

Plan plan(const LineScanCall& call, const Kernels& kernels, int64_t threads, bool backward) {
  Plan plan{};
  const size_t state = size_of_state(call.dtype);
  const bool shared = call.groups != call.channels;
  const int64_t per_group = call.channels / call.groups;
  const int64_t lanes = kernels.vector_bytes / static_cast<int64_t>(state);

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

// 0, or 1 if memory ran out.
GSPN_EXPORT int32_t gspn_line_scan(const LineScanCall* call, int64_t threads) {
  const Kernels& kernel = kernels();
  const Plan p = plan(*call, kernel, threads, false);
  expect_first_touch(call->h.data, map_bytes(*call));
  const bool done = run(p.items, p.scratch_bytes, threads,
                        [&](int64_t item, char* scratch) { kernel.forward(*call, p, item, scratch); });
  return done ? 0 : 1;
}

GSPN_EXPORT int32_t gspn_line_scan_backward(const LineScanCall* call, int64_t threads) {
  const Kernels& kernel = kernels();
  Plan p = plan(*call, kernel, threads, true);
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
                  [&](int64_t item, char* scratch) { kernel.backward(*call, p, item, scratch); });
  if (done && p.partials) {
    done = run(call->batch * call->groups, 0, threads, [&](int64_t item, char*) { kernel.reduce(*call, p, item); });
  }
  std::free(p.partials);
  return done ? 0 : 1;
}
