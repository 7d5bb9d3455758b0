// The backward sweep where columns are the lines and rows lie dense in memory.
//
// Only what the recurrence itself needs is transposed: the gradient and the taps on the way in, the adjoint state g on
// the way out. Everything else is a product of g with something at the same pixel or beside it, and is taken in image
// layout while a square of g is in registers: 5 transposes instead of 12, and x, lam, h and the five outputs never pass
// through scratch.
#pragma once

#include "item.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

template <class A>
struct MaskOf;
template <>
struct MaskOf<float> {
  using element = int32_t;
  using type = int32_vector;
};
template <>
struct MaskOf<double> {
  using element = int64_t;
  using type = int64_vector;
};

// One line of the adjoint recurrence: g = grad + carry in the place of grad, and carry for the line before it.
template <class A>
GSPN_INLINE void adjoint_line(int64_t n, A* g, const TapLine<A>& taps, bool has_prev, A* const q[3], A* carry) {
  const A *t0 = taps.t[0], *t1 = taps.t[1], *t2 = taps.t[2];
  A *q0 = q[0], *q1 = q[1], *q2 = q[2];
  if (!has_prev) {
    sweep<A>(n, g, false, [&](auto lane, int64_t i) __attribute__((always_inline)) {
      using L = decltype(lane);
      L::set(g + i, L::get(g + i) + L::get(carry + i));
    });
    return;
  }
  sweep<A>(n, g, false, [&](auto lane, int64_t i) __attribute__((always_inline)) {
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
  bool streamed;
  GSPN_INLINE T* at(int64_t p) const { return data + p * row; }
};

template <class T, class A, class P>
struct Products {
  Rows<const T> x, lam, h;
  Rows<T> dx, dlam;
  Rows<P> dt[3];  // tap gradients: the tensor's own type, or the state's for partial sums
  bool add_dt;
};

template <class A, class T>
GSPN_INLINE void put(const Rows<T>& rows, int64_t p, int64_t l, typename VectorOf<A>::type v, int64_t width) {
  if (width == kLanes<A>) {
    if (rows.streamed) {
      stream<A>(rows.at(p) + l, v);
    } else {
      store(rows.at(p) + l, v);
    }
  } else {
    store_some<A>(rows.at(p) + l, v, width);
  }
}

// The products of a tile: g is [line][row] with `pitch` between lines, `keep[l]` all ones where line l has a previous
// one. `low` is the tile's first column and `back` the offset to the previous one, -1 or +1.
template <class T, class A, class P>
void emit(const A* g, int64_t pitch, int64_t rows_count, int64_t columns, int64_t low, int64_t lines, int64_t back,
          const typename MaskOf<A>::element* keep, const Products<T, A, P>& out) {
  using V = typename VectorOf<A>::type;
  using M = typename MaskOf<A>::type;
  constexpr int W = kLanes<A>;
  V square[W];
  for (int64_t p = 0; p < rows_count; p += W) {
    const int64_t present = rows_count - p < W ? rows_count - p : W;
    for (int64_t l = 0; l < columns; l += W) {
      const int64_t width = columns - l < W ? columns - l : W;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) square[i] = i < width ? load(g + (l + i) * pitch + p) : V{};
      transpose<A>(square);
      // The previous states of these columns, read in place unless some lie outside the picture.
      const int64_t from = low + l + back;
      const bool inside = width == W && from >= 0 && from + W <= lines;
      M mask;
      memcpy(&mask, keep + l, sizeof(mask));
      const auto previous = [&](int64_t r) __attribute__((always_inline)) {
        if (r < 0 || r >= rows_count) return V{};
        const T* h = out.h.at(r) + l + back;
        if (inside) return load(h);
        T lanes[W] = {};
        for (int64_t i = 0; i < width; ++i) {
          if (from + i >= 0 && from + i < lines) lanes[i] = h[i];
        }
        return load(lanes);
      };
      const auto masked = [&](V v) __attribute__((always_inline)) { return bit_cast<V>(bit_cast<M>(v) & mask); };
      V above{}, here{}, below{};
      if (out.h.data) {
        above = previous(p - 1);
        here = previous(p);
      }
      for (int64_t i = 0; i < present; ++i) {
        const V v = square[i];
        const int64_t r = p + i;
        put<A>(out.dx, r, l, out.lam.data ? load_some<A>(out.lam.at(r) + l, width) * v : v, width);
        if (out.dlam.data) put<A>(out.dlam, r, l, load_some<A>(out.x.at(r) + l, width) * v, width);
        if (out.h.data) {
          below = previous(r + 1);
          // A neighbour outside the picture is left out, not multiplied by zero: g may be NaN.
          V d[3] = {r > 0 ? masked(v * above) : V{}, masked(v * here), r + 1 < rows_count ? masked(v * below) : V{}};
          for (int k = 0; k < 3; ++k) {
            if (out.add_dt) d[k] += load_some<A>(out.dt[k].at(r) + l, width);
            put<A>(out.dt[k], r, l, d[k], width);
          }
          above = here;
          here = below;
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
  auto* keep = scratch.take<typename MaskOf<A>::element>(plan.tile + kLanes<A>);
  const int64_t padded = n + 2 + kLanes<A>;
  A* q[3];
  for (auto& line : q) {
    line = scratch.take<A>(padded) + 1;
    clear(line - 1, padded);
  }
  A* carries = scratch.take<A>(item.channels * padded);

  // Whether whole vectors of a tensor's rows can be written around the caches, from a column that ends a cache line.
  const auto streams = [&](const void* data, int64_t row) {
    return plan.stream && sizeof(T) == sizeof(A) && aligned<A>(data) && row * sizeof(T) % GSPN_VECTOR_BYTES == 0;
  };
  for (int64_t step = item.last_step; step > item.first_step;) {
    const int64_t line = item.line_of(step - 1);
    int64_t count = call.reverse ? plan.tile - line % plan.tile : line % plan.tile + 1;
    if (count > step - item.first_step) count = step - item.first_step;
    const int64_t low = call.reverse ? line : line - count + 1;
    const int64_t begin = step - count;

    Lines<A> taps[3];
    bring_taps<T>(item, low, count, staging, taps);
    for (int64_t k = 0; k < count; ++k) keep[call.reverse ? count - 1 - k : k] = (begin + k) % call.segment ? -1 : 0;

    for (int64_t c = 0; c < item.channels; ++c) {
      const int64_t channel = item.channel + c;
      A* g = staging[3];
      gather(item.address(call.grad, channel, low), Rect{count, call.cross, 1, 1, call.grad.cross, 0}, g, pitch);
      A* carry = carries + c * padded;
      for (int64_t k = count - 1; k >= 0; --k) {
        const int64_t at = begin + k, l = call.reverse ? count - 1 - k : k;
        if (at + 1 == item.last_step || (at + 1) % call.segment == 0) clear(carry, n);
        adjoint_line<A>(n, g + l * pitch, {{taps[0].at(l), taps[1].at(l), taps[2].at(l)}, 1}, at % call.segment != 0, q,
                        carry);
      }

      const auto input = [&](const Map& map, bool wanted) {
        return Rows<const T>{wanted ? item.address(map, channel, low) : nullptr, map.cross, false};
      };
      const auto output = [&](const Map& map) {
        T* data = const_cast<T*>(item.address(map, channel, low));
        return Rows<T>{data, map.cross, streams(data, map.cross)};
      };
      const auto finish = [&](auto type) {
        using P = decltype(type);
        Products<T, A, P> out{input(call.x, need_lam), input(call.lam, true), input(call.h, need_taps),
                              output(call.dx), output(call.dlam), {}, c > 0};
        for (int k = 0; k < 3 && need_taps; ++k) {
          if (plan.partials) {
            const int64_t plane = ((item.block * call.batch + item.batch) * call.groups + item.group) * 3 + k;
            out.dt[k] = {static_cast<P*>(plan.partials) + plane * call.lines * call.cross + low, call.lines, false};
          } else {
            P* data = const_cast<P*>(reinterpret_cast<const P*>(item.address(call.dtaps, k, low)));
            out.dt[k] = {data, call.dtaps.cross, !item.shared && streams(data, call.dtaps.cross)};
          }
        }
        emit<T, A, P>(g, pitch, call.cross, count, low, call.lines, call.reverse ? 1 : -1, keep, out);
      };
      if (plan.partials) {
        finish(A{});
      } else {
        finish(T{});
      }
    }
    step -= count;
  }
  stream_fence();
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
