// The backward sweep where columns are the lines and rows lie dense in memory.
//
// Only what the recurrence itself needs is transposed: the gradient and the taps on the way in, the adjoint state g on
// the way out. Everything else is a product of g with something at the same pixel or beside it, and is taken in image
// layout while a band of g is at hand: 5 transposes instead of 12, and x, lam, h and the five outputs never pass
// through scratch.
#pragma once

#include "work_item.h"

namespace gspn::GSPN_ISA {
namespace {

// Rows of x and lam fetched ahead of the outputs: between writes, a load that misses the caches waits for them.
constexpr int64_t kRowsAhead = 2;

// One line of the adjoint recurrence: g = grad + carry in the place of grad, and carry for the line before it.
template <class A>
GSPN_INLINE void adjoint_line(int64_t n, A* g, const TapLine<A>& taps, bool has_prev, A* const q[3], A* carry) {
  const A *t0 = taps.tap[0], *t1 = taps.tap[1], *t2 = taps.tap[2];
  A *q0 = q[0], *q1 = q[1], *q2 = q[2];
  if (!has_prev) {
    for_each_element<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
      using L = decltype(lane);
      L::set(g + i, L::get(g + i) + L::get(carry + i));
    });
    return;
  }
  for_each_element<A>(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    const auto v = L::get(g + i) + L::get(carry + i);
    L::set(g + i, v);
    L::set(q0 + i, L::get(t0 + i) * v);
    L::set(q1 + i, L::get(t1 + i) * v);
    L::set(q2 + i, L::get(t2 + i) * v);
  });
  gather_carry<A>(n, 1, q, carry);
}

// The rows of a tensor, each dense. They begin at the range's first column.
template <class T>
struct Rows {
  T* data;  // null: absent
  int64_t row;
  GSPN_INLINE T* at(int64_t r) const { return data + r * row; }
};

// The factors of the adjoint state of a range of columns, and where their products go.
template <class T, class P, class A = typename StateOf<T>::type>
struct Products {
  Rows<T> x, lam, h;  // x, h: null if dlam, dtaps are not computed
  Rows<T> dx, dlam;
  Rows<P> dtaps[3];  // the tensor's own type, or the state's for partial sums
  bool add_dtaps;    // other channels have written theirs
  int64_t rows, columns, columns_before, columns_of_image;
  int64_t back;                                         // from a column to the previous one: -1 or 1
  const typename VectorOf<A>::index_element* has_prev;  // all ones for columns that have a previous one
};

// The previous states of a band of rows and of the rows beside it, for `width` columns from l on: row j holds those of
// row `first - 1 + j`. What lies outside the image is 0 and belongs to a column that has no previous line. They are
// loaded before the band's outputs are written: between the writes, loads would wait for stores to other tensors whose
// addresses look alike.
template <class T, class P, class A>
GSPN_INLINE void load_previous_states(const Products<T, P>& products, int64_t first, int64_t l, int64_t width,
                                      A (*out)[Band<A>::pitch]) {
  // At most one column of an image has its previous one outside.
  const int64_t column = products.columns_before + l + products.back;
  const int64_t skip = column < 0 ? 1 : 0, over = column + width > products.columns_of_image ? 1 : 0;
  for (int64_t j = 0; j < kLanes<A> + 2; ++j) {
    const int64_t r = first - 1 + j;
    if (r < 0 || r >= products.rows) continue;
    const T* row = products.h.at(r) + l + products.back;
    if (skip) out[j][0] = 0;
    if (over) out[j][width - 1] = 0;
    fetch_row(row + (kLanes<A> + 2) * products.h.row, width);
    copy_in(row + skip, out[j] + skip, width - skip - over);
  }
}

// dx = lam g, dlam = x g and dtap_k = g h_{i-1}[j+k-1]; g is [column][row] with `pitch` between columns.
template <class T, class P, class A>
void write_products(const A* g, int64_t pitch, const Products<T, P>& products) {
  using V = typename VectorOf<A>::type;
  using M = typename VectorOf<A>::index;
  constexpr int W = kLanes<A>;
  const auto [x, lam, h, dx, dlam, dtaps, add_dtaps, rows, columns, before, all, back, has_prev] = products;
  Band<A> band;
  alignas(64) A previous[W + 2][Band<A>::pitch];
  for (int64_t l = 0; l < columns; l += kBand) {
    const int64_t width = minimum(columns - l, kBand);
    for (int64_t p = 0; p < rows; p += W) {
      transpose_out(g + l * pitch + p, pitch, width, band);
      if (h.data) load_previous_states(products, p, l, width, previous);
      for (int64_t i = 0; i < W && p + i < rows; ++i) {
        const int64_t r = p + i;
        if (lam.data) fetch_row(lam.at(r + kRowsAhead) + l, width);
        if (x.data) fetch_row(x.at(r + kRowsAhead) + l, width);
        for (int64_t k = 0; k < width; k += W) {
          const int64_t c = l + k, some = minimum(width - k, W);
          const V v = load(band.rows[i] + k);
          store_some<A>(dx.at(r) + c, lam.data ? load_some<A>(lam.at(r) + c, some) * v : v, some);
          if (x.data) store_some<A>(dlam.at(r) + c, load_some<A>(x.at(r) + c, some) * v, some);
          if (!h.data) continue;
          M mask;
          memcpy(&mask, has_prev + c, sizeof(mask));
          for (int j = 0; j < 3; ++j) {
            // A neighbour outside the image is left out, not multiplied by zero: g may be NaN.
            V d{};
            if (r + j > 0 && r + j <= rows) d = bit_cast<V>(bit_cast<M>(v * load(previous[i + j] + k)) & mask);
            if (add_dtaps) d += load_some<A>(dtaps[j].at(r) + c, some);
            store_some<A>(dtaps[j].at(r) + c, d, some);
          }
        }
      }
    }
  }
}

template <class A>
struct BackwardColumnsScratch {
  A *taps[3], *g;
  typename VectorOf<A>::index_element* has_prev;
  A *q[3], *carries;  // padded lines; a carry for each channel

  BackwardColumnsScratch(Scratch& scratch, const LineScanPlan& plan) {
    for (A*& tap : taps) tap = scratch.take<A>(plan.tile * plan.pitch);
    g = scratch.take<A>(plan.tile * plan.pitch);
    has_prev = scratch.take<typename VectorOf<A>::index_element>(plan.tile + kLanes<A>);
    for (A*& line : q) line = scratch.take<A>(plan.pitch);
    carries = scratch.take<A>(plan.block * plan.pitch);
  }
};

// The products of one channel; P is the type of the tap gradients.
template <class P, class T, class A>
void write_products_of(const WorkItem<T>& item, const LineRange& range, int64_t c,
                       const BackwardColumnsScratch<A>& scratch) {
  const LineScanCall& call = item.call;
  const int64_t low = range.low;
  const auto rows = [&](const Image& image) {
    return Rows<T>{item.address(image, item.channel + c, low), image.column};
  };
  const Rows<T> absent{nullptr, 0};
  Products<T, P> products{call.dlam.data ? rows(call.x) : absent,
                          rows(call.lam),
                          call.dtaps.image.data ? rows(call.h) : absent,
                          rows(call.dx),
                          rows(call.dlam),
                          {},
                          c > 0,
                          call.cross,
                          range.count,
                          low,
                          call.lines,
                          -range.increment,
                          scratch.has_prev};
  for (int k = 0; k < 3; ++k) {
    if (item.plan.partials) {
      products.dtaps[k] = {reinterpret_cast<P*>(item.partial_taps(k)) + low, call.lines};
    } else {
      products.dtaps[k] = {reinterpret_cast<P*>(item.tap_address(call.dtaps, k, low)), call.dtaps.image.column};
    }
  }
  write_products(scratch.g, item.plan.pitch, products);
}

template <class T>
void backward_columns(const LineScanCall& call, const LineScanPlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  const WorkItem<T> item(call, plan, index);
  const int64_t n = item.n, pitch = plan.pitch;
  Scratch pieces(memory);
  BackwardColumnsScratch<A> scratch(pieces, plan);
  for (A*& line : scratch.q) clear(line, pitch), ++line;

  for (int64_t step = item.last_step; step > item.first_step;) {
    const LineRange range = item.range_until(step);
    const int64_t begin = range.first_step;
    const TapLines<A> taps(item, range, scratch.taps);
    for (int64_t k = 0; k < range.count; ++k) scratch.has_prev[range.line(k)] = item.starts_segment(begin + k) ? 0 : -1;
    for (int64_t c = 0; c < item.channels; ++c) {
      gather_transposed(item.address(call.grad, item.channel + c, range.low), call.grad.column, range.count, n,
                        scratch.g, pitch);
      A* carry = scratch.carries + c * pitch;
      for (int64_t k = range.count - 1; k >= 0; --k) {
        const int64_t l = range.line(k);
        if (item.ends_segment(begin + k)) clear(carry, n);
        adjoint_line<A>(n, scratch.g + l * pitch, taps.at(l), !item.starts_segment(begin + k), scratch.q, carry);
      }
      plan.partials ? write_products_of<A>(item, range, c, scratch) : write_products_of<T>(item, range, c, scratch);
    }
    step = begin;
  }
}

}  // namespace
}  // namespace gspn::GSPN_ISA
