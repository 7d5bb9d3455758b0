// What both sweeps share: an item of work, its taps, and the loop over the elements of a line.
#pragma once

#include "line_scan.h"
#include "staging.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

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

  // Image lines that the steps [from, to) visit, as [first line, count).
  int64_t line_of(int64_t step) const { return call.reverse ? call.lines - 1 - step : step; }

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
template <class A>
struct ManyStreamed : Many<A> {
  static GSPN_INLINE void set(A* p, typename Many<A>::type v) { stream<A>(p, v); }
};

// Runs step(lane, i) over [0, count): vectors, then single elements. With streaming, single elements first until `out`
// is aligned.
template <class A, class Step>
GSPN_INLINE void sweep(int64_t count, const A* out, bool streaming, Step step) {
  int64_t i = 0;
  if (streaming) {
    const auto misaligned = reinterpret_cast<uintptr_t>(out) % GSPN_VECTOR_BYTES;
    if (misaligned) {
      int64_t peel = static_cast<int64_t>((GSPN_VECTOR_BYTES - misaligned) / sizeof(A));
      if (peel > count) peel = count;
      for (; i < peel; ++i) step(One<A>{}, i);
    }
    for (; i + kLanes<A> <= count; i += kLanes<A>) step(ManyStreamed<A>{}, i);
  } else {
    for (; i + kLanes<A> <= count; i += kLanes<A>) step(Many<A>{}, i);
  }
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
  sweep<A>(n, carry, false, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    L::set(carry + i, L::get(q[0] + i + m) + L::get(q[1] + i) + L::get(q[2] + i - m));
  });
}

// The three taps of a tile's lines. Shared taps are one scalar a pixel, whatever m is.
template <class T, class A = typename StateOf<T>::type>
void bring_taps(const Item<T>& item, int64_t line, int64_t count, A* const staging[3], Lines<A> taps[3]) {
  const LineScanCall& call = item.call;
  const int64_t m = item.shared ? 1 : item.m;
  for (int k = 0; k < 3; ++k) {
    taps[k] = bring<T>(item.address(call.taps, k, line), count, call.cross, m, call.taps.line, call.taps.cross,
                       call.taps.group, staging[k], item.plan.pitch, false);
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
