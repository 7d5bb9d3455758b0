// The forward sweep of one item.
#pragma once

#include "forward_columns.h"
#include "item.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

// h = lam x + taps over the previous states; `prev` is padded by `m` zeros on both sides, or null on the first line.
template <class A, bool kHasLam, bool kHasPrev, bool kScalarTaps>
GSPN_INLINE void forward_run(int64_t count, int64_t m, const A* x, const A* lam, const A* t0, const A* t1, const A* t2,
                             const A* prev, A* next, A* out) {
  sweep<A>(count, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    auto v = L::get(x + i);
    if constexpr (kHasLam) v = v * L::get(lam + i);
    if constexpr (kHasPrev) {
      if constexpr (kScalarTaps) {
        v += *t0 * L::get(prev + i - m);
        v += *t1 * L::get(prev + i);
        v += *t2 * L::get(prev + i + m);
      } else {
        v += L::get(t0 + i) * L::get(prev + i - m);
        v += L::get(t1 + i) * L::get(prev + i);
        v += L::get(t2 + i) * L::get(prev + i + m);
      }
    }
    L::set(next + i, v);
    L::set(out + i, v);
  });
}

// A pixel that lacks a neighbour, computed again without it.
template <class A>
GSPN_INLINE void forward_end(int64_t m, const A* x, const A* lam, const A* t0, const A* t1, const A* t2, int64_t tap_step,
                             const A* prev, A* next, A* out, bool before, bool after) {
  for (int64_t c = 0; c < m; ++c) {
    A v = lam ? x[c] * lam[c] : x[c];
    if (before) v += t0[c * tap_step] * prev[c - m];
    v += t1[c * tap_step] * prev[c];
    if (after) v += t2[c * tap_step] * prev[c + m];
    next[c] = v;
    out[c] = v;
  }
}

template <class A, bool kHasLam, bool kHasPrev>
void forward_line_of(int64_t cross, int64_t m, bool scalar_taps, const A* x, int64_t x_cross, const A* lam,
                     int64_t lam_cross, const TapLine<A>& taps, const A* prev, A* next, A* out, int64_t out_cross) {
  const int64_t n = cross * m;
  const bool flat = x_cross == m && (!kHasLam || lam_cross == m) && out_cross == m && (!kHasPrev || taps.cross == m);
  if (flat && !(scalar_taps && m > 1)) {
    forward_run<A, kHasLam, kHasPrev, false>(n, m, x, lam, taps.t[0], taps.t[1], taps.t[2], prev, next, out);
  } else {
    for (int64_t p = 0; p < cross; ++p) {
      const A* lam_p = kHasLam ? lam + p * lam_cross : nullptr;
      const A* t0 = kHasPrev ? taps.t[0] + p * taps.cross : nullptr;
      const A* t1 = kHasPrev ? taps.t[1] + p * taps.cross : nullptr;
      const A* t2 = kHasPrev ? taps.t[2] + p * taps.cross : nullptr;
      const A* prev_p = kHasPrev ? prev + p * m : nullptr;
      if (scalar_taps) {
        forward_run<A, kHasLam, kHasPrev, true>(m, m, x + p * x_cross, lam_p, t0, t1, t2, prev_p, next + p * m,
                                                out + p * out_cross);
      } else {
        forward_run<A, kHasLam, kHasPrev, false>(m, m, x + p * x_cross, lam_p, t0, t1, t2, prev_p, next + p * m,
                                                 out + p * out_cross);
      }
    }
  }
  if constexpr (kHasPrev) {
    const int64_t tap_step = scalar_taps ? 0 : 1;
    const int64_t last = cross - 1;
    forward_end<A>(m, x, kHasLam ? lam : nullptr, taps.t[0], taps.t[1], taps.t[2], tap_step, prev, next, out, false,
                   cross > 1);
    if (cross > 1) {
      forward_end<A>(m, x + last * x_cross, kHasLam ? lam + last * lam_cross : nullptr, taps.t[0] + last * taps.cross,
                     taps.t[1] + last * taps.cross, taps.t[2] + last * taps.cross, tap_step, prev + last * m,
                     next + last * m, out + last * out_cross, true, false);
    }
  }
}

template <class A>
void forward_line(int64_t cross, int64_t m, bool scalar_taps, const A* x, int64_t x_cross, const A* lam,
                  int64_t lam_cross, const TapLine<A>& taps, const A* prev, A* next, A* out, int64_t out_cross) {
  auto run = [&](auto body) { body(cross, m, scalar_taps, x, x_cross, lam, lam_cross, taps, prev, next, out, out_cross); };
  if (lam) {
    prev ? run(forward_line_of<A, true, true>) : run(forward_line_of<A, true, false>);
  } else {
    prev ? run(forward_line_of<A, false, true>) : run(forward_line_of<A, false, false>);
  }
}

template <class T>
void forward(const LineScanCall& call, const Plan& plan, int64_t index, char* base) {
  if (plan.columns) return forward_columns<T>(call, plan, index, base);
  using A = typename StateOf<T>::type;
  const Item<T> item(call, plan, index);
  const int64_t m = item.m, n = item.n, pitch = plan.pitch;
  Scratch scratch(base);
  A* staging[6];
  for (auto& s : staging) s = scratch.take<A>(plan.tile * pitch);
  // Two state lines a channel (of a planar item) or for all (interleaved), padded by m on both sides.
  const int64_t lanes = plan.interleaved ? 1 : item.channels;
  const int64_t state_pitch = n + 2 * m + kLanes<A>;
  A* states = scratch.take<A>(2 * lanes * state_pitch);
  clear(states, 2 * lanes * state_pitch);
  const bool scalar_taps = item.shared && m > 1;

  for (int64_t step = item.first_step; step < item.last_step;) {
    const Tile tile = item.tile_from(step);
    const int64_t low = tile.low, count = tile.count;
    Lines<A> taps[3];
    bring_taps<T>(item, tile, staging, taps);
    for (int64_t c = 0; c < lanes; ++c) {
      const int64_t channel = item.channel + c;
      const auto x = bring<T>(item.address(call.x, channel, low), count, call.cross, m, call.x.line, call.x.cross,
                              call.x.channel, staging[3], pitch);
      const auto lam = bring<T>(item.address(call.lam, channel, low), count, call.cross, m, call.lam.line,
                                call.lam.cross, call.lam.channel, staging[4], pitch);
      const Output<T> h(const_cast<T*>(item.address(call.h, channel, low)), count, call.cross, m, call.h.line,
                        call.h.cross, call.h.channel, staging[5], pitch);
      A* state = states + 2 * c * state_pitch + m;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t at = step + k, l = tile.line(k);
        A* next = state + (at % 2) * state_pitch;
        const A* prev = at % call.segment == 0 ? nullptr : state + ((at + 1) % 2) * state_pitch;
        forward_line<A>(call.cross, m, scalar_taps, x.at(l), x.cross, lam.at(l), lam.cross,
                        {{taps[0].at(l), taps[1].at(l), taps[2].at(l)}, taps[0].cross}, prev, next, h.lines.at(l),
                        h.lines.cross);
      }
      h.put();
    }
    step += count;
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
