// The forward sweep of one item: h_i = lam x + sum_k tap_k h_{i-1}[j+k-1].
#include "forward_columns.h"

namespace gspn::GSPN_ISA {
namespace {

// One line; strides are from position to position.
template <class A>
struct ForwardLine {
  int64_t cross, m;
  bool scalar_taps;
  Lines<A> x, lam;  // `line`: from here to the line scanned next
  TapLine<A> taps;
  int64_t next_taps;  // from here to the taps scanned next
  const A* prev;      // [cross][m], padded by m zeros on both sides; not used on a segment's first line
  A* next;            // the same, written
  Lines<A> h;
};

// `count` elements from position p on that lie side by side in every tensor.
template <class A, bool kHasLam, bool kHasPrev, bool kScalarTaps>
GSPN_INLINE void forward_run(const ForwardLine<A>& line, int64_t p, int64_t count) {
  const int64_t m = line.m;
  const A *x = line.x.position(p), *lam = line.lam.position(p), *prev = line.prev + p * m;
  const A *t0 = line.taps.position(0, p), *t1 = line.taps.position(1, p), *t2 = line.taps.position(2, p);
  A *next = line.next + p * m, *h = line.h.position(p);
  for_each_element<A>(count, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    // Processors fetch what follows in memory by themselves; the line above is not what follows.
    if constexpr (L::is_vector) {
      __builtin_prefetch(x + i + line.x.line);
      if constexpr (kHasLam) __builtin_prefetch(lam + i + line.lam.line);
      if constexpr (kHasPrev && !kScalarTaps) {
        __builtin_prefetch(t0 + i + line.next_taps);
        __builtin_prefetch(t1 + i + line.next_taps);
        __builtin_prefetch(t2 + i + line.next_taps);
      }
    }
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
template <class A, bool kHasLam>
GSPN_INLINE void forward_end(const ForwardLine<A>& line, int64_t p, bool before, bool after) {
  const int64_t m = line.m, tap_step = line.scalar_taps ? 0 : 1;
  const A *x = line.x.position(p), *lam = line.lam.position(p), *prev = line.prev + p * m;
  const A *t0 = line.taps.position(0, p), *t1 = line.taps.position(1, p), *t2 = line.taps.position(2, p);
  A *next = line.next + p * m, *h = line.h.position(p);
  for (int64_t c = 0; c < m; ++c) {
    A v = kHasLam ? x[c] * lam[c] : x[c];
    if (before) v += t0[c * tap_step] * prev[c - m];
    v += t1[c * tap_step] * prev[c];
    if (after) v += t2[c * tap_step] * prev[c + m];
    next[c] = h[c] = v;
  }
}

template <class A, bool kHasLam, bool kHasPrev>
GSPN_INLINE void forward_line(const ForwardLine<A>& line) {
  const int64_t m = line.m;
  const bool dense = line.x.cross == m && (!kHasLam || line.lam.cross == m) && line.h.cross == m &&
                     (!kHasPrev || line.taps.cross == m);
  if (dense && !line.scalar_taps) {
    forward_run<A, kHasLam, kHasPrev, false>(line, 0, line.cross * m);
  } else {
    for (int64_t p = 0; p < line.cross; ++p) {
      if (line.scalar_taps) {
        forward_run<A, kHasLam, kHasPrev, true>(line, p, m);
      } else {
        forward_run<A, kHasLam, kHasPrev, false>(line, p, m);
      }
    }
  }
  if constexpr (kHasPrev) {
    forward_end<A, kHasLam>(line, 0, false, line.cross > 1);
    if (line.cross > 1) forward_end<A, kHasLam>(line, line.cross - 1, true, false);
  }
}

// The lines of a range, one after the other; `line` begins as the range's first line in memory. All is inlined into one
// loop over copies of the arguments: members behind a reference would be read again for every line.
template <class A, bool kHasLam>
void forward_lines(int64_t segment, LineRange range, ForwardLine<A> line, TapLines<A> taps, A* states, int64_t pitch) {
  const Lines<A> x = line.x, lam = line.lam, h = line.h;
  line.x.line *= range.increment, line.lam.line *= range.increment;
  line.next_taps = range.increment * taps.tap[0].line;
  for (int64_t k = 0; k < range.count; ++k) {
    const int64_t l = range.line(k), step = range.first_step + k, odd = step % 2;
    line.x.data = x.at(l), line.lam.data = lam.at(l), line.h.data = h.at(l), line.taps = taps.at(l);
    line.prev = states + (1 - odd) * pitch, line.next = states + odd * pitch;
    step % segment == 0 ? forward_line<A, kHasLam, false>(line) : forward_line<A, kHasLam, true>(line);
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
      const ForwardLine<A> line{call.cross, item.m, item.scalar_taps(), x, lam, {}, 0, nullptr, nullptr, h.lines};
      (lam.data ? forward_lines<A, true> : forward_lines<A, false>)(call.segment, range, line, taps, states, pitch);
      h.flush();
    }
    step += range.count;
  }
}

}  // namespace

extern const LineScanKernel line_scan_forward;
const LineScanKernel line_scan_forward = {
    [](const LineScanCall& call, const LineScanPlan& plan, int64_t item, char* scratch) {
      LineScanCall memory;
      const LineScanCall& own = call.of_image(plan.image_of(call, item), memory);
      dispatch_on_dtype(call.dtype, [&](auto type) {
        using T = decltype(type);
        plan.columns ? forward_columns<T>(own, plan, item, scratch) : forward<T>(own, plan, item, scratch);
        WorkItem<T>(own, plan, item).clear_padding_of_outputs(call, item);
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
