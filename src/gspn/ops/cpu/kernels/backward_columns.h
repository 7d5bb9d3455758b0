// The backward sweep where columns are the lines and rows lie dense in memory.
//
// Only what the recurrence itself needs is transposed: the gradient and the taps on the way in, the adjoint state g on
// the way out. Everything else is a product of g with something at the same pixel or beside it, and is taken in image
// layout while a band of g is at hand: 5 transposes instead of 12, and x, lam, h and the five outputs never pass
// through scratch.
#pragma once

#include "item.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

// Rows of x and lam fetched ahead of the outputs: between writes, a load that misses the caches waits for them.
constexpr int64_t kRowsAhead = 2;

// One line of the adjoint recurrence: g = grad + carry in the place of grad, and carry for the line before it.
template <class A>
GSPN_INLINE void adjoint_line(int64_t n, A* g, const TapLine<A>& taps, bool has_prev, A* const q[3], A* carry) {
  const A *t0 = taps.t[0], *t1 = taps.t[1], *t2 = taps.t[2];
  A *q0 = q[0], *q1 = q[1], *q2 = q[2];
  if (!has_prev) {
    sweep<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
      using L = decltype(lane);
      L::set(g + i, L::get(g + i) + L::get(carry + i));
    });
    return;
  }
  sweep<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    const auto v = L::get(g + i) + L::get(carry + i);
    L::set(g + i, v);
    L::set(q0 + i, L::get(t0 + i) * v);
    L::set(q1 + i, L::get(t1 + i) * v);
    L::set(q2 + i, L::get(t2 + i) * v);
  });
  gather_carry<A>(n, 1, q, carry);
}

// A row of dense pixels of one tensor, or nothing.
template <class T>
struct Rows {
  T* data;
  int64_t row;
  GSPN_INLINE T* at(int64_t p) const { return data + p * row; }
};

template <class T, class A, class P>
struct Products {
  Rows<const T> x, lam, h;
  Rows<T> dx, dlam;
  Rows<P> dt[3];  // tap gradients: the tensor's own type, or the state's for partial sums
  bool add_dt;
};

// The previous states of a band of rows and of the rows beside it, for `width` columns from `column` on: row j holds
// those of row `first - 1 + j`. What lies outside the picture is 0 and belongs to a column that has no previous line.
// They are brought in before the band's outputs are written: between the writes, loads would wait for stores to other
// tensors whose addresses look alike.
template <class T, class A>
GSPN_INLINE void bring_previous(const Rows<const T>& h, int64_t first, int64_t rows, int64_t column, int64_t back,
                                int64_t l, int64_t width, int64_t columns, A (*out)[Band<A>::pitch]) {
  for (int64_t j = 0; j < kLanes<A> + 2; ++j) {
    const int64_t r = first - 1 + j;
    if (r < 0 || r >= rows) continue;
    const T* row = h.at(r) + l + back;
    // At most one column of a picture has its previous one outside.
    const int64_t skip = column + back < 0 ? 1 : 0, over = column + back + width > columns ? 1 : 0;
    if (skip) out[j][0] = 0;
    if (over) out[j][width - 1] = 0;
    fetch_row(row + (kLanes<A> + 2) * h.row, width);
    copy_run(row + skip, out[j] + skip, width - skip - over);
  }
}

// The products of a tile: g is [line][row] with `pitch` between lines, `keep[l]` all ones where line l has a previous
// one. `low` is the tile's first column and `back` the offset to the previous one, -1 or +1.
template <class T, class A, class P>
void emit(const A* g, int64_t pitch, int64_t rows, int64_t columns, int64_t low, int64_t all_columns, int64_t back,
          const typename VectorOf<A>::index_element* keep, const Products<T, A, P>& out) {
  using V = typename VectorOf<A>::type;
  using M = typename VectorOf<A>::index;
  constexpr int W = kLanes<A>;
  Band<A> band;
  alignas(64) A previous[W + 2][Band<A>::pitch];
  for (int64_t l = 0; l < columns; l += kBand) {
    const int64_t width = columns - l < kBand ? columns - l : kBand;
    for (int64_t p = 0; p < rows; p += W) {
      turn_out(g + l * pitch + p, pitch, width, band);
      if (out.h.data) bring_previous(out.h, p, rows, low + l, back, l, width, all_columns, previous);
      for (int64_t i = 0; i < W && p + i < rows; ++i) {
        const int64_t r = p + i;
        if (out.lam.data) fetch_row(out.lam.at(r + kRowsAhead) + l, width);
        if (out.x.data) fetch_row(out.x.at(r + kRowsAhead) + l, width);
        for (int64_t k = 0; k < width; k += W) {
          const int64_t c = l + k, some = width - k < W ? width - k : W;
          const V v = load(band.rows[i] + k);
          store_some<A>(out.dx.at(r) + c, out.lam.data ? load_some<A>(out.lam.at(r) + c, some) * v : v, some);
          if (out.dlam.data) store_some<A>(out.dlam.at(r) + c, load_some<A>(out.x.at(r) + c, some) * v, some);
          if (!out.h.data) continue;
          M mask;
          memcpy(&mask, keep + c, sizeof(mask));
          for (int j = 0; j < 3; ++j) {
            // A neighbour outside the picture is left out, not multiplied by zero: g may be NaN.
            V d{};
            if (r + j > 0 && r + j <= rows) {
              d = bit_cast<V>(bit_cast<M>(v * load(previous[i + j] + k)) & mask);
            }
            if (out.add_dt) d += load_some<A>(out.dt[j].at(r) + c, some);
            store_some<A>(out.dt[j].at(r) + c, d, some);
          }
        }
      }
    }
  }
}

template <class T>
void backward_columns(const LineScanCall& call, const Plan& plan, int64_t index, char* base) {
  using A = typename StateOf<T>::type;
  const Item<T> item(call, plan, index);
  const int64_t n = item.n, pitch = plan.pitch;
  const bool need_lam = call.dlam.data, need_taps = call.dtaps.data;
  Scratch scratch(base);
  A* staging[4];
  for (auto& s : staging) s = scratch.take<A>(plan.tile * pitch);
  auto* keep = scratch.take<typename VectorOf<A>::index_element>(plan.tile + kLanes<A>);
  const int64_t padded = n + 2 + kLanes<A>;
  A* q[3];
  for (auto& line : q) {
    line = scratch.take<A>(padded) + 1;
    clear(line - 1, padded);
  }
  A* carries = scratch.take<A>(item.channels * padded);

  for (int64_t step = item.last_step; step > item.first_step;) {
    const Tile tile = item.tile_until(step);
    const int64_t low = tile.low, count = tile.count, begin = step - count;
    Lines<A> taps[3];
    bring_taps<T>(item, tile, staging, taps);
    for (int64_t k = 0; k < count; ++k) keep[tile.line(k)] = (begin + k) % call.segment ? -1 : 0;

    for (int64_t c = 0; c < item.channels; ++c) {
      const int64_t channel = item.channel + c;
      A* g = staging[3];
      gather(item.address(call.grad, channel, low), Rect{count, call.cross, 1, 1, call.grad.cross, 0}, g, pitch);
      A* carry = carries + c * padded;
      for (int64_t k = count - 1; k >= 0; --k) {
        const int64_t at = begin + k, l = tile.line(k);
        if (at + 1 == item.last_step || (at + 1) % call.segment == 0) clear(carry, n);
        adjoint_line<A>(n, g + l * pitch, {{taps[0].at(l), taps[1].at(l), taps[2].at(l)}, 1}, at % call.segment != 0, q,
                        carry);
      }

      const auto input = [&](const Map& map, bool wanted) {
        return Rows<const T>{wanted ? item.address(map, channel, low) : nullptr, map.cross};
      };
      const auto output = [&](const Map& map) {
        T* data = const_cast<T*>(item.address(map, channel, low));
        return Rows<T>{data, map.cross};
      };
      const auto finish = [&](auto type) {
        using P = decltype(type);
        Products<T, A, P> out{input(call.x, need_lam), input(call.lam, true), input(call.h, need_taps),
                              output(call.dx), output(call.dlam), {}, c > 0};
        for (int k = 0; k < 3 && need_taps; ++k) {
          if (plan.partials) {
            const int64_t plane = ((item.block * call.batch + item.batch) * call.groups + item.group) * 3 + k;
            out.dt[k] = {static_cast<P*>(plan.partials) + plane * call.lines * call.cross + low, call.lines};
          } else {
            P* data = const_cast<P*>(reinterpret_cast<const P*>(item.address(call.dtaps, k, low)));
            out.dt[k] = {data, call.dtaps.cross};
          }
        }
        emit<T, A, P>(g, pitch, call.cross, count, low, call.lines, -tile.forth, keep, out);
      };
      if (plan.partials) {
        finish(A{});
      } else {
        finish(T{});
      }
    }
    step -= count;
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
