// What both sweeps share: an item of work, its taps, and the loop over the elements of a line.
#pragma once

#include "line_scan.h"
#include "staging.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

GSPN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A few lines that are staged together.
struct Tile {
  int64_t low, count;  // lines [low, low + count) of the image
  int64_t forth;       // from a line to the one scanned next: 1 or -1
  // The line of the tile that is scanned k-th.
  int64_t line(int64_t k) const { return forth > 0 ? k : count - 1 - k; }
};

// What an item knows of its call: the shape of its lines and where its scratch is.
template <class T>
struct Item {
  using A = typename StateOf<T>::type;

  const LineScanCall& call;
  const Plan& plan;
  int64_t batch, group, channel, channels;  // channels [channel, channel + channels), in tap group `group` if shared
  int64_t block;                            // the block's number within its group
  int64_t first_step, last_step;            // scan steps [first, last)
  bool shared;                              // one set of taps for all channels of the group
  int64_t m;                                // channels side by side in a line
  int64_t n;                                // elements of a line: cross * m

  Item(const LineScanCall& call, const Plan& plan, int64_t index) : call(call), plan(plan) {
    shared = call.groups != call.channels;
    const int64_t span = index % plan.spans;
    index /= plan.spans;
    block = index % plan.blocks;
    index /= plan.blocks;
    const int64_t per_group = call.channels / call.groups;
    if (shared) {
      group = index % call.groups;
      batch = index / call.groups;
      channel = group * per_group + block * plan.block;
      channels = per_group - block * plan.block;
    } else {
      batch = index;
      channel = group = block * plan.block;
      channels = call.channels - channel;
    }
    if (channels > plan.block) channels = plan.block;
    const int64_t segments = (call.lines + call.segment - 1) / call.segment;
    first_step = segments * span / plan.spans * call.segment;
    last_step = segments * (span + 1) / plan.spans * call.segment;
    if (last_step > call.lines) last_step = call.lines;
    m = plan.interleaved ? channels : 1;
    n = call.cross * m;
  }

  int64_t line_of(int64_t step) const { return call.reverse ? call.lines - 1 - step : step; }

  // Tiles end at multiples of `plan.tile` in the image, so that staged columns fill whole cache lines. The tile whose
  // first step in the order of the scan is `step`:
  Tile tile_from(int64_t step) const {
    const int64_t line = line_of(step), within = line % plan.tile;
    const int64_t count = least(call.reverse ? within + 1 : plan.tile - within, last_step - step);
    return {call.reverse ? line - count + 1 : line, count, call.reverse ? -1 : 1};
  }
  // The tile whose last step is `step` - 1.
  Tile tile_until(int64_t step) const {
    const int64_t line = line_of(step - 1), within = line % plan.tile;
    const int64_t count = least(call.reverse ? plan.tile - within : within + 1, step - first_step);
    return {call.reverse ? line : line - count + 1, count, call.reverse ? -1 : 1};
  }

  const T* address(const Map& map, int64_t c, int64_t line) const {
    return map.data ? static_cast<const T*>(map.data) + batch * map.batch + c * map.channel + line * map.line : nullptr;
  }
  const T* address(const TapMap& map, int64_t tap, int64_t line) const {
    return static_cast<const T*>(map.data) + batch * map.batch + group * map.group + tap * map.tap + line * map.line;
  }
};

// One element or one vector at i: the same formula twice, so that a line's last elements round as the others do.
template <class A>
struct One {
  using type = A;
  static GSPN_INLINE A get(const A* p) { return *p; }
  static GSPN_INLINE void set(A* p, A v) { *p = v; }
};
template <class A>
struct Many {
  using type = typename VectorOf<A>::type;
  static GSPN_INLINE type get(const A* p) { return load(p); }
  static GSPN_INLINE void set(A* p, type v) { store(p, v); }
};

// Runs step(lane, i) over [0, count): vectors, then single elements.
template <class A, class Step>
GSPN_INLINE void sweep(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) step(Many<A>{}, i);
  for (; i < count; ++i) step(One<A>{}, i);
}

// The taps of one line at one cross position (m > 1 and shared) or from it on.
template <class A>
struct TapLine {
  const A* t[3];
  int64_t cross;
};

template <class A>
void clear(A* p, int64_t count) {
  memset(p, 0, static_cast<size_t>(count) * sizeof(A));
}

// What the line before takes over: carry[p] = q0[p+1] + q1[p] + q2[p-1], the q padded by zeros.
template <class A>
void gather_carry(int64_t n, int64_t m, A* const q[3], A* carry) {
  sweep<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    L::set(carry + i, L::get(q[0] + i + m) + L::get(q[1] + i) + L::get(q[2] + i - m));
  });
}

// The three taps of a tile's lines. Shared taps are one scalar a pixel, whatever m is.
template <class T, class A = typename StateOf<T>::type>
void bring_taps(const Item<T>& item, const Tile& tile, A* const staging[3], Lines<A> taps[3]) {
  const LineScanCall& call = item.call;
  const int64_t m = item.shared ? 1 : item.m;
  for (int k = 0; k < 3; ++k) {
    taps[k] = bring<T>(item.address(call.taps, k, tile.low), tile.count, call.cross, m, call.taps.line, call.taps.cross,
                       call.taps.group, staging[k], item.plan.pitch);
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
