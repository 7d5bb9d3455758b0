// The backward sweep of one item: the adjoint scan and every gradient, each tensor read or written once.
#pragma once

#include "backward_columns.h"
#include "item.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

// One line of the adjoint scan: g = grad + carry, its products with lam, x, the previous states, and q_k = tap_k g for
// the line before. With shared taps the tap gradients of a vector of channels end in `dt` as single numbers.
template <class A>
struct BackwardLine {
  int64_t cross, m;
  bool scalar_taps, has_prev, add_dt;
  const A *grad, *x, *lam, *carry, *prev;  // carry, prev: [cross][m], prev padded
  int64_t grad_cross, x_cross, lam_cross;
  int64_t ahead[4];  // from here to the next line of grad, x, lam and the taps: fetched while this one is computed
  TapLine<A> taps;
  A *dx, *dlam;
  int64_t dx_cross, dlam_cross;
  A* dt[3];
  int64_t dt_cross;
  A* q[3];  // [cross][m], padded
};

template <class A, bool kHasLam, bool kNeedLam, bool kNeedTaps, bool kHasPrev, bool kAdd>
GSPN_INLINE void backward_run(int64_t count, int64_t m, const A* grad, const A* x, const A* lam, const A* carry,
                              const A* prev, const A* t0, const A* t1, const A* t2, A* dx, A* dlam, A* dt0, A* dt1,
                              A* dt2, A* q0, A* q1, A* q2, const int64_t* ahead) {
  sweep<A>(count, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    constexpr bool one = sizeof(typename L::type) == sizeof(A);
    if constexpr (!one) {
      __builtin_prefetch(grad + i + ahead[0]);
      if constexpr (kNeedLam) __builtin_prefetch(x + i + ahead[1]);
      if constexpr (kHasLam) __builtin_prefetch(lam + i + ahead[2]);
      if constexpr (kHasPrev) {
        __builtin_prefetch(t0 + i + ahead[3]);
        __builtin_prefetch(t1 + i + ahead[3]);
        __builtin_prefetch(t2 + i + ahead[3]);
      }
    }
    auto g = L::get(grad + i) + L::get(carry + i);
    if constexpr (kHasLam) {
      L::set(dx + i, L::get(lam + i) * g);
    } else {
      L::set(dx + i, g);
    }
    if constexpr (kNeedLam) L::set(dlam + i, L::get(x + i) * g);
    if constexpr (kHasPrev) {
      if constexpr (kNeedTaps) {
        auto d0 = g * L::get(prev + i - m);
        auto d1 = g * L::get(prev + i);
        auto d2 = g * L::get(prev + i + m);
        if constexpr (kAdd) {
          L::set(dt0 + i, L::get(dt0 + i) + d0);
          L::set(dt1 + i, L::get(dt1 + i) + d1);
          L::set(dt2 + i, L::get(dt2 + i) + d2);
        } else {
          L::set(dt0 + i, d0);
          L::set(dt1 + i, d1);
          L::set(dt2 + i, d2);
        }
      }
      L::set(q0 + i, L::get(t0 + i) * g);
      L::set(q1 + i, L::get(t1 + i) * g);
      L::set(q2 + i, L::get(t2 + i) * g);
    }
  });
}

template <class A>
GSPN_INLINE A sum_lanes(typename VectorOf<A>::type v) {
  A sum = v[0];
  for (int i = 1; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

// One pixel of m channels that share its taps.
template <class A, bool kHasLam, bool kNeedLam, bool kNeedTaps, bool kHasPrev>
GSPN_INLINE void backward_pixel(int64_t m, const A* grad, const A* x, const A* lam, const A* carry, const A* prev, A t0,
                                A t1, A t2, A* dx, A* dlam, A* dt0, A* dt1, A* dt2, A* q0, A* q1, A* q2) {
  using V = typename VectorOf<A>::type;
  V d0{}, d1{}, d2{};
  A s0 = 0, s1 = 0, s2 = 0;
  int64_t i = 0;
  for (; i + kLanes<A> <= m; i += kLanes<A>) {
    const V g = load(grad + i) + load(carry + i);
    store(dx + i, kHasLam ? load(lam + i) * g : g);
    if constexpr (kNeedLam) store(dlam + i, load(x + i) * g);
    if constexpr (kHasPrev) {
      if constexpr (kNeedTaps) {
        d0 += g * load(prev + i - m);
        d1 += g * load(prev + i);
        d2 += g * load(prev + i + m);
      }
      store(q0 + i, t0 * g);
      store(q1 + i, t1 * g);
      store(q2 + i, t2 * g);
    }
  }
  for (; i < m; ++i) {
    const A g = grad[i] + carry[i];
    dx[i] = kHasLam ? lam[i] * g : g;
    if constexpr (kNeedLam) dlam[i] = x[i] * g;
    if constexpr (kHasPrev) {
      if constexpr (kNeedTaps) {
        s0 += g * prev[i - m];
        s1 += g * prev[i];
        s2 += g * prev[i + m];
      }
      q0[i] = t0 * g;
      q1[i] = t1 * g;
      q2[i] = t2 * g;
    }
  }
  if constexpr (kHasPrev && kNeedTaps) {
    *dt0 = s0 + sum_lanes<A>(d0);
    *dt1 = s1 + sum_lanes<A>(d1);
    *dt2 = s2 + sum_lanes<A>(d2);
  }
}

template <class A, bool kHasLam, bool kNeedLam, bool kNeedTaps, bool kHasPrev>
void backward_line_of(const BackwardLine<A>& b) {
  const int64_t m = b.m;
  const bool flat = b.grad_cross == m && b.dx_cross == m && (!kHasLam || b.lam_cross == m) &&
                    (!kNeedLam || (b.x_cross == m && b.dlam_cross == m)) && (!kHasPrev || b.taps.cross == m) &&
                    (!kHasPrev || !kNeedTaps || b.dt_cross == m);
  const int64_t pixels = flat && !b.scalar_taps ? 1 : b.cross;
  const int64_t count = pixels == 1 ? b.cross * m : m;
  for (int64_t p = 0; p < pixels; ++p) {
    const A* x = kNeedLam ? b.x + p * b.x_cross : nullptr;
    const A* lam = kHasLam ? b.lam + p * b.lam_cross : nullptr;
    const A* prev = kHasPrev && kNeedTaps ? b.prev + p * m : nullptr;
    A* dlam = kNeedLam ? b.dlam + p * b.dlam_cross : nullptr;
    const A* t[3] = {};
    A *dt[3] = {}, *q[3] = {};
    if constexpr (kHasPrev) {
      for (int k = 0; k < 3; ++k) {
        t[k] = b.taps.t[k] + p * b.taps.cross;
        q[k] = b.q[k] + p * m;
        if constexpr (kNeedTaps) dt[k] = b.dt[k] + p * b.dt_cross;
      }
    }
    const A *grad = b.grad + p * b.grad_cross, *carry = b.carry + p * m;
    A* dx = b.dx + p * b.dx_cross;
    if (b.scalar_taps) {
      if constexpr (kHasPrev) {
        backward_pixel<A, kHasLam, kNeedLam, kNeedTaps, true>(m, grad, x, lam, carry, prev, *t[0], *t[1], *t[2], dx, dlam,
                                                              dt[0], dt[1], dt[2], q[0], q[1], q[2]);
      } else {
        backward_pixel<A, kHasLam, kNeedLam, kNeedTaps, false>(m, grad, x, lam, carry, prev, 0, 0, 0, dx, dlam, nullptr,
                                                               nullptr, nullptr, nullptr, nullptr, nullptr);
      }
    } else if (kNeedTaps && kHasPrev && b.add_dt) {
      backward_run<A, kHasLam, kNeedLam, kNeedTaps, kHasPrev, true>(count, m, grad, x, lam, carry, prev, t[0], t[1], t[2],
                                                                    dx, dlam, dt[0], dt[1], dt[2], q[0], q[1], q[2],
                                                                    b.ahead);
    } else {
      backward_run<A, kHasLam, kNeedLam, kNeedTaps, kHasPrev, false>(count, m, grad, x, lam, carry, prev, t[0], t[1],
                                                                     t[2], dx, dlam, dt[0], dt[1], dt[2], q[0], q[1],
                                                                     q[2], b.ahead);
    }
  }
  if constexpr (kNeedTaps) {
    // Taps that reach outside, and all taps of a first line, weigh nothing: their gradient is 0, even beside a NaN.
    const int64_t width = b.scalar_taps ? 1 : m;
    if constexpr (kHasPrev) {
      for (int64_t c = 0; c < width; ++c) b.dt[0][c] = b.dt[2][(b.cross - 1) * b.dt_cross + c] = 0;
    } else if (!b.add_dt) {
      for (int64_t p = 0; p < b.cross; ++p) {
        for (int64_t c = 0; c < width; ++c) {
          b.dt[0][p * b.dt_cross + c] = b.dt[1][p * b.dt_cross + c] = b.dt[2][p * b.dt_cross + c] = 0;
        }
      }
    }
  }
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

template <class A>
void backward_line(const BackwardLine<A>& b, bool need_lam, bool need_taps) {
  auto with_prev = [&](auto has_lam, auto lam_wanted, auto taps_wanted) {
    if (b.has_prev) {
      backward_line_of<A, decltype(has_lam)::value, decltype(lam_wanted)::value, decltype(taps_wanted)::value, true>(b);
    } else {
      backward_line_of<A, decltype(has_lam)::value, decltype(lam_wanted)::value, decltype(taps_wanted)::value, false>(b);
    }
  };
  auto with_taps = [&](auto has_lam, auto lam_wanted) {
    need_taps ? with_prev(has_lam, lam_wanted, Yes{}) : with_prev(has_lam, lam_wanted, No{});
  };
  if (!b.lam) {
    with_taps(No{}, No{});
  } else {
    need_lam ? with_taps(Yes{}, Yes{}) : with_taps(Yes{}, No{});
  }
}

template <class T>
void backward(const LineScanCall& call, const Plan& plan, int64_t index, char* base) {
  if (plan.columns) return backward_columns<T>(call, plan, index, base);
  using A = typename StateOf<T>::type;
  const Item<T> item(call, plan, index);
  const int64_t m = item.m, n = item.n, pitch = plan.pitch;
  const bool need_lam = call.dlam.data, need_taps = call.dtaps.data;
  Scratch scratch(base);
  A* staging[12];
  for (auto& s : staging) s = scratch.take<A>(plan.tile * pitch);
  const int64_t padded = n + 2 * m + kLanes<A>;
  const int64_t lanes = plan.interleaved ? 1 : item.channels;
  A* q[3];
  for (auto& line : q) {
    line = scratch.take<A>(padded) + m;
    clear(line - m, padded);
  }
  A* carries = scratch.take<A>(lanes * padded);
  // The previous states are always staged, for the padding: a line in memory has its neighbours' data beyond its ends.
  A* h_lines = staging[11];
  clear(h_lines, plan.tile * pitch);
  const bool scalar_taps = item.shared && m > 1;
  const int64_t dt_m = item.shared ? 1 : m;

  for (int64_t step = item.last_step; step > item.first_step;) {
    const Tile tile = item.tile_until(step);
    const int64_t low = tile.low, count = tile.count, begin = step - count;
    Lines<A> taps[3];
    bring_taps<T>(item, tile, staging, taps);
    // Tap gradients of this tile: to the tensor, or this block's part of the sum over the group's channels.
    T* dt_base[3] = {};
    A* partial[3] = {};
    if (need_taps) {
      for (int k = 0; k < 3; ++k) {
        if (plan.partials) {
          const int64_t plane = ((item.block * call.batch + item.batch) * call.groups + item.group) * 3 + k;
          partial[k] = static_cast<A*>(plan.partials) + (plane * call.lines + low) * call.cross;
        } else {
          dt_base[k] = const_cast<T*>(item.address(call.dtaps, k, low));
        }
      }
    }
    const Output<T> dt[3] = {
        {dt_base[0], count, call.cross, dt_m, call.dtaps.line, call.dtaps.cross, call.dtaps.group, staging[8], pitch},
        {dt_base[1], count, call.cross, dt_m, call.dtaps.line, call.dtaps.cross, call.dtaps.group, staging[9], pitch},
        {dt_base[2], count, call.cross, dt_m, call.dtaps.line, call.dtaps.cross, call.dtaps.group, staging[10], pitch}};

    for (int64_t c = 0; c < lanes; ++c) {
      const int64_t channel = item.channel + c;
      const auto grad = bring<T>(item.address(call.grad, channel, low), count, call.cross, m, call.grad.line,
                                 call.grad.cross, call.grad.channel, staging[3], pitch);
      const auto lam = bring<T>(item.address(call.lam, channel, low), count, call.cross, m, call.lam.line,
                                call.lam.cross, call.lam.channel, staging[4], pitch);
      const auto x = bring<T>(need_lam ? item.address(call.x, channel, low) : nullptr, count, call.cross, m, call.x.line,
                              call.x.cross, call.x.channel, staging[5], pitch);
      if (need_taps) {
        // The states one step before each of the tile's lines; those outside the picture are never read.
        int64_t from = call.reverse ? low + 1 : low - 1, skip = 0, lines = count;
        if (from < 0) from = 0, skip = 1, --lines;
        if (from + lines > call.lines) --lines;
        if (lines > 0) {
          gather(item.address(call.h, channel, from),
                 Rect{lines, call.cross, m, call.h.line, call.h.cross, call.h.channel}, h_lines + skip * pitch + m, pitch);
        }
      }
      const Output<T> dx(const_cast<T*>(item.address(call.dx, channel, low)), count, call.cross, m, call.dx.line,
                         call.dx.cross, call.dx.channel, staging[6], pitch);
      const Output<T> dlam(const_cast<T*>(item.address(call.dlam, channel, low)), count, call.cross, m, call.dlam.line,
                           call.dlam.cross, call.dlam.channel, staging[7], pitch);
      A* carry = carries + c * padded;

      BackwardLine<A> b;
      b.cross = call.cross;
      b.m = m;
      b.scalar_taps = scalar_taps;
      b.carry = carry;
      b.q[0] = q[0], b.q[1] = q[1], b.q[2] = q[2];
      for (int64_t k = count - 1; k >= 0; --k) {
        const int64_t at = begin + k, l = tile.line(k);
        // The line after this one starts a segment, or there is none: nothing comes back from it.
        if (at + 1 == item.last_step || (at + 1) % call.segment == 0) clear(carry, n);
        b.has_prev = at % call.segment != 0;
        b.add_dt = !plan.interleaved && c > 0;
        b.grad = grad.at(l), b.grad_cross = grad.cross;
        b.x = x.at(l), b.x_cross = x.cross;
        b.lam = lam.at(l), b.lam_cross = lam.cross;
        b.ahead[0] = -tile.forth * grad.line, b.ahead[1] = -tile.forth * x.line;
        b.ahead[2] = -tile.forth * lam.line, b.ahead[3] = -tile.forth * taps[0].line;
        b.prev = h_lines + l * pitch + m;
        b.taps = {{taps[0].at(l), taps[1].at(l), taps[2].at(l)}, taps[0].cross};
        b.dx = dx.lines.at(l), b.dx_cross = dx.lines.cross;
        b.dlam = dlam.lines.at(l), b.dlam_cross = dlam.lines.cross;
        for (int j = 0; j < 3; ++j) {
          b.dt[j] = partial[j] ? partial[j] + l * call.cross : dt[j].lines.at(l);
        }
        b.dt_cross = partial[0] ? 1 : dt[0].lines.cross;
        backward_line<A>(b, need_lam, need_taps);
        if (b.has_prev) gather_carry<A>(n, m, q, carry);
      }
      dx.put();
      dlam.put();
    }
    for (const auto& d : dt) d.put();
    step -= count;
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
