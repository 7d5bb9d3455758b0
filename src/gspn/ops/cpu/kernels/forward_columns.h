// The forward sweep where columns are the lines and rows lie dense in memory.
//
// Only what the recurrence needs is transposed: lam x as one tensor, and the taps. The state replaces lam x in place.
#pragma once

#include "item.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

// v = v + taps over the line before, in the place of v; both padded by a zero on either side.
template <class A>
GSPN_INLINE void recur(int64_t n, A* v, const TapLine<A>& taps, const A* prev) {
  const A *t0 = taps.t[0], *t1 = taps.t[1], *t2 = taps.t[2];
  const A first = v[0], last = v[n - 1];
  sweep<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    auto s = L::get(v + i);
    s += L::get(t0 + i) * L::get(prev + i - 1);
    s += L::get(t1 + i) * L::get(prev + i);
    s += L::get(t2 + i) * L::get(prev + i + 1);
    L::set(v + i, s);
  });
  // The ends lack a neighbour, which is left out rather than multiplied by zero.
  v[0] = n > 1 ? first + t1[0] * prev[0] + t2[0] * prev[1] : first + t1[0] * prev[0];
  if (n > 1) v[n - 1] = last + t0[n - 1] * prev[n - 2] + t1[n - 1] * prev[n - 1];
}

template <class T>
void forward_columns(const LineScanCall& call, const Plan& plan, int64_t index, char* base) {
  using A = typename StateOf<T>::type;
  const Item<T> item(call, plan, index);
  const int64_t n = item.n, pitch = plan.pitch;
  Scratch scratch(base);
  A* staging[3];
  for (auto& s : staging) s = scratch.take<A>(plan.tile * pitch);
  A* lines = scratch.take<A>(plan.tile * pitch);
  clear(lines, plan.tile * pitch);
  // The last line of the tile before, of each channel.
  A* carries = scratch.take<A>(item.channels * pitch);
  clear(carries, item.channels * pitch);

  for (int64_t step = item.first_step; step < item.last_step;) {
    const Tile tile = item.tile_from(step);
    Lines<A> taps[3];
    bring_taps<T>(item, tile, staging, taps);
    for (int64_t c = 0; c < item.channels; ++c) {
      const int64_t channel = item.channel + c;
      const T *x = item.address(call.x, channel, tile.low), *lam = item.address(call.lam, channel, tile.low);
      A* v = lines + 1;
      if (lam) {
        gather_product(x, call.x.cross, lam, call.lam.cross, tile.count, n, v, pitch);
      } else {
        gather_transposed(x, Rect{tile.count, n, 1, 1, call.x.cross, 0}, v, pitch);
      }
      A* carry = carries + c * pitch + 1;
      for (int64_t k = 0; k < tile.count; ++k) {
        if ((step + k) % call.segment == 0) continue;
        const int64_t l = tile.line(k);
        A* here = v + l * pitch;
        const A* prev = k == 0 ? carry : here - tile.forth * pitch;
        recur<A>(n, here, {{taps[0].at(l), taps[1].at(l), taps[2].at(l)}, 1}, prev);
      }
      memcpy(carry, v + tile.line(tile.count - 1) * pitch, static_cast<size_t>(n) * sizeof(A));
      scatter_transposed(v, pitch, Rect{tile.count, n, 1, 1, call.h.cross, 0},
                         const_cast<T*>(item.address(call.h, channel, tile.low)));
    }
    step += tile.count;
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
