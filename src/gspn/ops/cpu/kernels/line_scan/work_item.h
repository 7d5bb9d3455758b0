// An item of work, its taps, and the loop over the elements of a line, for both sweeps.
//
// A kernel's view of a line is [cross][m]: m channels that lie side by side in memory (channels_last), or m = 1. The
// neighbour at cross offset -1 or +1 is then m elements away. What can be walked in place is; anything else (half
// precision, columns as lines, taps of another layout than x) is staged a few lines at a time in scratch that stays in
// the caches: converted, transposed or gathered. No tensor is ever copied as a whole.
//
// Memory decides the speed (6 tensors forward, 12 backward), so the arithmetic is written plainly: the state lives in
// padded lines of scratch, and pixels at the ends of a line, which lack a neighbour, are computed again without it, so
// that nothing, not even a NaN, is multiplied by a zero that stands for "does not exist".
#pragma once

#include "../common/padding.h"
#include "../common/scratch.h"
#include "call.h"
#include "views.h"

namespace gspn::GSPN_ISA {
namespace {

// A few lines that are staged together: lines [low, low + count) of the image.
struct LineRange {
  int64_t first_step, low, count;
  int64_t increment;  // from a line to the one scanned next: 1 or -1
  // The line of the range that is scanned k-th.
  int64_t line(int64_t k) const { return increment > 0 ? k : count - 1 - k; }
};

// The part of a call that one item computes: channels [channel, channel + channels) of one batch entry.
template <class T>
struct WorkItem {
  using A = typename StateOf<T>::type;

  const LineScanCall& call;
  const LineScanPlan& plan;
  int64_t batch, group, channel, channels;
  int64_t block;                  // the block's number within its group
  int64_t first_step, last_step;  // scan steps [first, last)
  bool shared;                    // one set of taps for all channels of the group
  int64_t m;                      // channels side by side in a line
  int64_t n;                      // elements of a line: cross * m

  WorkItem(const LineScanCall& call, const LineScanPlan& plan, int64_t index)
      : call(call), plan(plan), shared(call.shared_taps()) {
    const int64_t span = index % plan.spans;
    index /= plan.spans;
    block = index % plan.blocks;
    index /= plan.blocks;
    const int64_t per_group = call.channels / call.groups;
    if (shared) {
      group = index % call.groups;
      batch = index / call.groups;
      channel = group * per_group + block * plan.block;
      channels = minimum(per_group - block * plan.block, plan.block);
    } else {
      batch = index;
      channel = group = block * plan.block;
      channels = minimum(call.channels - channel, plan.block);
    }
    first_step = call.segments() * span / plan.spans * call.segment;
    last_step = minimum(call.segments() * (span + 1) / plan.spans * call.segment, call.lines);
    m = plan.interleaved ? channels : 1;
    n = call.cross * m;
  }

  // Channels that are scanned one after the other: all of a planar item, or one line of interleaved channels.
  int64_t scans() const { return plan.interleaved ? 1 : channels; }
  // All channels of a pixel take the same number.
  bool scalar_taps() const { return shared && m > 1; }
  int64_t line_of(int64_t step) const { return call.reverse ? call.lines - 1 - step : step; }
  bool starts_segment(int64_t step) const { return step % call.segment == 0; }
  // Nothing comes back from the line after this one: it starts a segment, or there is none.
  bool ends_segment(int64_t step) const { return step + 1 == last_step || starts_segment(step + 1); }

  // Ranges end at multiples of `plan.tile` in the image, so that staged columns fill whole cache lines. The range whose
  // first step in the order of the scan is `step`:
  LineRange range_from(int64_t step) const {
    const int64_t line = line_of(step), within = line % plan.tile;
    const int64_t count = minimum(call.reverse ? within + 1 : plan.tile - within, last_step - step);
    return {step, call.reverse ? line - count + 1 : line, count, call.reverse ? -1 : 1};
  }
  // The range whose last step is `step` - 1.
  LineRange range_until(int64_t step) const {
    const int64_t line = line_of(step - 1), within = line % plan.tile;
    const int64_t count = minimum(call.reverse ? plan.tile - within : within + 1, step - first_step);
    return {step - count, call.reverse ? line : line - count + 1, count, call.reverse ? -1 : 1};
  }

  T* address(const Image& image, int64_t channel, int64_t line) const {
    return image.data ? static_cast<T*>(image.data) + batch * image.batch + channel * image.channel + line * image.row
                      : nullptr;
  }
  T* tap_address(const Taps& taps, int64_t tap, int64_t line) const {
    return taps.image.data ? address(taps.image, group, line) + tap * taps.tap : nullptr;
  }
  View<T> view(const Image& image, int64_t channel, int64_t line, int64_t lines) const {
    return {address(image, channel, line), lines, call.cross, m, image.row, image.column, image.channel};
  }
  // Shared taps are one number a pixel, whatever m is.
  View<T> tap_view(const Taps& taps, int64_t tap, const LineRange& range) const {
    const Image& image = taps.image;
    return {tap_address(taps, tap, range.low),
            range.count,
            call.cross,
            shared ? 1 : m,
            image.row,
            image.column,
            image.channel};
  }
  // Zeros in the padding of an output, in the channels of this item; `map` is the call for the whole map.
  void clear_padding_of(const LineScanCall& map, const Image& image, int64_t channel, int64_t channels,
                        int64_t offset = 0) const {
    T* data = image.data ? address(image, channel, 0) + offset : nullptr;
    clear_padding(data, image, channels, map.lines, map.cross, call.lines, call.cross);
  }
  void clear_padding_of_outputs(const LineScanCall& map, int64_t index) const {
    if (!map.sizes || index % plan.spans != 0) return;
    if (!map.grad.data) return clear_padding_of(map, map.h, channel, channels);
    clear_padding_of(map, map.dx, channel, channels);
    clear_padding_of(map, map.dlam, channel, channels);
    for (int64_t k = 0; k < 3 && !(shared && block); ++k) {
      clear_padding_of(map, map.dtaps.image, group, shared ? 1 : channels, k * map.dtaps.tap);
    }
  }
  // This block's part of the sum over a group's channels: one plane for each tap.
  A* partial_taps(int64_t tap) const {
    const int64_t plane = ((block * call.batch + batch) * call.groups + group) * 3 + tap;
    return static_cast<A*>(plan.partials) + plane * plan.pixels;
  }
};

// One element or one vector at i: the same formula twice, so that a line's last elements round as the others do.
template <class A>
struct Scalar {
  using type = A;
  static constexpr bool is_vector = false;
  static GSPN_INLINE A get(const A* p) { return *p; }
  static GSPN_INLINE void set(A* p, A v) { *p = v; }
};
template <class A>
struct Vector {
  using type = typename VectorOf<A>::type;
  static constexpr bool is_vector = true;
  static GSPN_INLINE type get(const A* p) { return load(p); }
  static GSPN_INLINE void set(A* p, type v) { store(p, v); }
};

// Runs step(lane, i) over [0, count): vectors, then single elements.
template <class A, class Step>
GSPN_INLINE void for_each_element(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) step(Vector<A>{}, i);
  for (; i < count; ++i) {
    asm("");  // too few to be worth the checks that a vectorized loop begins with
    step(Scalar<A>{}, i);
  }
}

// The three taps of one line, `cross` elements from position to position.
template <class A>
struct TapLine {
  const A* tap[3];
  int64_t cross;
  GSPN_INLINE const A* position(int k, int64_t p) const { return tap[k] + p * cross; }
};

// The three taps of a range's lines.
template <class A>
struct TapLines {
  Lines<A> tap[3];

  template <class T>
  TapLines(const WorkItem<T>& item, const LineRange& range, A* const staging[3]) {
    for (int k = 0; k < 3; ++k) {
      tap[k] = load_or_view(item.tap_view(item.call.taps, k, range), staging[k], item.plan.pitch);
    }
  }
  TapLine<A> at(int64_t l) const { return {{tap[0].at(l), tap[1].at(l), tap[2].at(l)}, tap[0].cross}; }
};

// The sum that the line before takes over: carry[p] = q0[p+1] + q1[p] + q2[p-1], the q padded by zeros.
template <class A>
void gather_carry(int64_t n, int64_t m, A* const q[3], A* carry) {
  for_each_element<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    L::set(carry + i, L::get(q[0] + i + m) + L::get(q[1] + i) + L::get(q[2] + i - m));
  });
}

}  // namespace
}  // namespace gspn::GSPN_ISA
