// The forward sweep of one item: h_i = lam x + sum_k tap_k h_{i-1}[j+k-1].
#include "forward_columns.h"

namespace gspn::GSPN_ISA {
namespace {

// One line from a cross position on; strides are from position to position.
template <class A>
struct ForwardLine {
  int64_t cross, m;
  bool scalar_taps, has_prev;
  Lines<A> x, lam;
  TapLine<A> taps;
  const A* prev;  // [cross][m], padded by m zeros on both sides; not used on a segment's first line
  A* next;        // the same, written
  Lines<A> h;

  GSPN_INLINE ForwardLine at(int64_t p) const {
    ForwardLine line = *this;
    line.x.data += p * x.cross, line.lam.data += p * lam.cross, line.h.data += p * h.cross;
    for (auto& tap : line.taps.tap) tap += p * taps.cross;
    line.prev += p * m, line.next += p * m;
    return line;
  }
};

// `count` elements that lie side by side in every tensor.
template <class A, bool kHasLam, bool kHasPrev, bool kScalarTaps>
GSPN_INLINE void forward_run(const ForwardLine<A>& line, int64_t count) {
  const int64_t m = line.m;
  const A *x = line.x.data, *lam = line.lam.data, *prev = line.prev;
  const A *t0 = line.taps.tap[0], *t1 = line.taps.tap[1], *t2 = line.taps.tap[2];
  A *next = line.next, *h = line.h.data;
  for_each_element<A>(count, [&](auto lane, int64_t i) __attribute__((always_inline)) {
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
    L::set(h + i, v);
  });
}

// A pixel that lacks a neighbour, computed again without it.
template <class A>
GSPN_INLINE void forward_end(const ForwardLine<A>& line, bool before, bool after) {
  const int64_t m = line.m, tap_step = line.scalar_taps ? 0 : 1;
  for (int64_t c = 0; c < m; ++c) {
    const auto tap = [&](int k) { return line.taps.tap[k][c * tap_step]; };
    A v = line.lam.data ? line.x.data[c] * line.lam.data[c] : line.x.data[c];
    if (before) v += tap(0) * line.prev[c - m];
    v += tap(1) * line.prev[c];
    if (after) v += tap(2) * line.prev[c + m];
    line.next[c] = v;
    line.h.data[c] = v;
  }
}

template <class A, bool kHasLam, bool kHasPrev>
void forward_line_of(const ForwardLine<A>& line) {
  const int64_t m = line.m;
  const bool dense = line.x.cross == m && (!kHasLam || line.lam.cross == m) && line.h.cross == m &&
                     (!kHasPrev || line.taps.cross == m);
  if (dense && !line.scalar_taps) {
    forward_run<A, kHasLam, kHasPrev, false>(line, line.cross * m);
  } else {
    for (int64_t p = 0; p < line.cross; ++p) {
      if (line.scalar_taps) {
        forward_run<A, kHasLam, kHasPrev, true>(line.at(p), m);
      } else {
        forward_run<A, kHasLam, kHasPrev, false>(line.at(p), m);
      }
    }
  }
  if constexpr (kHasPrev) {
    forward_end(line, false, line.cross > 1);
    if (line.cross > 1) forward_end(line.at(line.cross - 1), true, false);
  }
}

template <class A>
void forward_line(const ForwardLine<A>& line) {
  if (line.lam.data) {
    line.has_prev ? forward_line_of<A, true, true>(line) : forward_line_of<A, true, false>(line);
  } else {
    line.has_prev ? forward_line_of<A, false, true>(line) : forward_line_of<A, false, false>(line);
  }
}

template <class A>
struct ForwardScratch {
  A *taps[3], *x, *lam, *h;
  A* states;  // two padded lines for each scan

  ForwardScratch(Scratch& scratch, const LineScanPlan& plan) {
    const int64_t staged = plan.tile * plan.pitch;
    for (A*& tap : taps) tap = scratch.take<A>(staged);
    x = scratch.take<A>(staged), lam = scratch.take<A>(staged), h = scratch.take<A>(staged);
    states = scratch.take<A>(2 * (plan.interleaved ? 1 : plan.block) * plan.pitch);
  }
};

template <class T>
void forward(const LineScanCall& call, const LineScanPlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  const WorkItem<T> item(call, plan, index);
  const int64_t pitch = plan.pitch;
  Scratch pieces(memory);
  const ForwardScratch<A> scratch(pieces, plan);
  clear(scratch.states, 2 * item.scans() * pitch);

  for (int64_t step = item.first_step; step < item.last_step;) {
    const LineRange range = item.range_from(step);
    const TapLines<A> taps(item, range, scratch.taps);
    for (int64_t c = 0; c < item.scans(); ++c) {
      const auto view = [&](const Image& image) { return item.view(image, item.channel + c, range.low, range.count); };
      const Lines<A> x = load_or_view(view(call.x), scratch.x, pitch);
      const Lines<A> lam = load_or_view(view(call.lam), scratch.lam, pitch);
      const Output<T> h(view(call.h), scratch.h, pitch);
      A* states = scratch.states + 2 * c * pitch + item.m;
      ForwardLine<A> line{call.cross, item.m, item.scalar_taps(), false, x, lam, {}, nullptr, nullptr, h.lines};
      for (int64_t k = 0; k < range.count; ++k) {
        const int64_t l = range.line(k), odd = (step + k) % 2;
        line.x.data = x.at(l), line.lam.data = lam.at(l), line.h.data = h.lines.at(l);
        line.taps = taps.at(l);
        line.has_prev = !item.starts_segment(step + k);
        line.prev = states + (1 - odd) * pitch, line.next = states + odd * pitch;
        forward_line(line);
      }
      h.flush();
    }
    step += range.count;
  }
}

}  // namespace

extern const LineScanKernel line_scan_forward;
const LineScanKernel line_scan_forward = {
    [](const LineScanCall& call, const LineScanPlan& plan, int64_t item, char* scratch) {
      dispatch_on_dtype(call.dtype, [&](auto type) {
        using T = decltype(type);
        plan.columns ? forward_columns<T>(call, plan, item, scratch) : forward<T>(call, plan, item, scratch);
      });
    },
    [](const LineScanCall& call, const LineScanPlan& plan) {
      return dispatch_on_dtype(call.dtype, [&](auto type) {
        using A = typename StateOf<decltype(type)>::type;
        return plan.columns ? scratch_bytes<ForwardColumnsScratch<A>>(plan) : scratch_bytes<ForwardScratch<A>>(plan);
      });
    },
};

}  // namespace gspn::GSPN_ISA
