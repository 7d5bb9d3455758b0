// The forward sweep where columns are the lines and rows lie dense in memory.
//
// Only what the recurrence needs is transposed: lam x as one tensor, and the taps. The state replaces lam x in place.
#pragma once

#include "work_item.h"

namespace gspn::GSPN_ISA {
namespace {

// h = h + taps over the line before, in the place of h; both padded by a zero on either side.
template <class A>
GSPN_INLINE void add_previous_line(int64_t n, A* h, const TapLine<A>& taps, const A* prev) {
  const A *t0 = taps.tap[0], *t1 = taps.tap[1], *t2 = taps.tap[2];
  const A first = h[0], last = h[n - 1];
  for_each_element<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    auto s = L::get(h + i);
    s += L::get(t0 + i) * L::get(prev + i - 1);
    s += L::get(t1 + i) * L::get(prev + i);
    s += L::get(t2 + i) * L::get(prev + i + 1);
    L::set(h + i, s);
  });
  // The ends lack a neighbour, which is left out rather than multiplied by zero.
  h[0] = n > 1 ? first + t1[0] * prev[0] + t2[0] * prev[1] : first + t1[0] * prev[0];
  if (n > 1) h[n - 1] = last + t0[n - 1] * prev[n - 2] + t1[n - 1] * prev[n - 1];
}

template <class A>
struct ForwardColumnsScratch {
  A *taps[3], *h;
  A* carries;  // the last line of the range before, of each channel

  ForwardColumnsScratch(Scratch& scratch, const LineScanPlan& plan) {
    for (A*& tap : taps) tap = scratch.take<A>(plan.tile * plan.pitch);
    h = scratch.take<A>(plan.tile * plan.pitch);
    carries = scratch.take<A>(plan.block * plan.pitch);
  }
};

template <class T>
void forward_columns(const LineScanCall& call, const LineScanPlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  const WorkItem<T> item(call, plan, index);
  const int64_t n = item.n, pitch = plan.pitch;
  Scratch pieces(memory);
  const ForwardColumnsScratch<A> scratch(pieces, plan);
  clear(scratch.h, plan.tile * pitch);
  clear(scratch.carries, plan.block * pitch);

  for (int64_t step = item.first_step; step < item.last_step;) {
    const LineRange range = item.range_from(step);
    const TapLines<A> taps(item, range, scratch.taps);
    for (int64_t c = 0; c < item.channels; ++c) {
      const int64_t channel = item.channel + c;
      const T *x = item.address(call.x, channel, range.low), *lam = item.address(call.lam, channel, range.low);
      A *h = scratch.h + 1, *carry = scratch.carries + c * pitch + 1;
      if (lam) {
        gather_product(x, call.x.column, lam, call.lam.column, range.count, n, h, pitch);
      } else {
        gather_transposed(x, call.x.column, range.count, n, h, pitch);
      }
      for (int64_t k = 0; k < range.count; ++k) {
        if (item.starts_segment(step + k)) continue;
        const int64_t l = range.line(k);
        A* line = h + l * pitch;
        add_previous_line<A>(n, line, taps.at(l), k == 0 ? carry : line - range.increment * pitch);
      }
      memcpy(carry, h + range.line(range.count - 1) * pitch, static_cast<size_t>(n) * sizeof(A));
      scatter_transposed(h, pitch, range.count, n, item.address(call.h, channel, range.low), call.h.column);
    }
    step += range.count;
  }
}

}  // namespace
}  // namespace gspn::GSPN_ISA
