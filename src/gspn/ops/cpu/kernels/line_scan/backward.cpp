// The backward sweep of one item: the adjoint scan and every gradient, each tensor read or written once.
//
//   g_i = grad_i + sum_k (tap_k g)_{i+1}[j-k+1]      dx = lam g      dlam = x g      dtap_k = g h_{i-1}[j+k-1]
#include "backward_columns.h"

namespace gspn::GSPN_ISA {
namespace {

// One line; strides are from position to position. q_k = tap_k g goes to the line before. With shared taps the tap
// gradients of a vector of channels end in `dtaps` as single numbers.
template <class A>
struct BackwardLine {
  int64_t cross, m;
  bool scalar_taps, has_prev, add_dtaps;
  Lines<A> grad, x, lam;  // `line`: from here to the line scanned next
  TapLine<A> taps;
  int64_t next_taps;      // from here to the taps scanned next, which are fetched while this line is computed
  const A *carry, *prev;  // [cross][m]; prev padded
  Lines<A> dx, dlam, dtaps[3];
  A* q[3];  // [cross][m], padded
};

// `count` elements from position p on that lie side by side in every tensor.
template <class A, bool kHasLam, bool kNeedLam, bool kNeedTaps, bool kHasPrev, bool kAdd>
GSPN_INLINE void backward_run(const BackwardLine<A>& line, int64_t p, int64_t count) {
  const int64_t m = line.m, at = p * m;
  const A *grad = line.grad.position(p), *x = line.x.position(p), *lam = line.lam.position(p);
  const A *carry = line.carry + at, *prev = line.prev + at;
  const A *t0 = line.taps.position(0, p), *t1 = line.taps.position(1, p), *t2 = line.taps.position(2, p);
  A *dx = line.dx.position(p), *dlam = line.dlam.position(p);
  A *dt0 = line.dtaps[0].position(p), *dt1 = line.dtaps[1].position(p), *dt2 = line.dtaps[2].position(p);
  A *q0 = line.q[0] + at, *q1 = line.q[1] + at, *q2 = line.q[2] + at;
  for_each_element<A>(count, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using L = decltype(lane);
    if constexpr (L::is_vector) {
      __builtin_prefetch(grad + i + line.grad.line);
      if constexpr (kNeedLam) __builtin_prefetch(x + i + line.x.line);
      if constexpr (kHasLam) __builtin_prefetch(lam + i + line.lam.line);
      if constexpr (kHasPrev) {
        __builtin_prefetch(t0 + i + line.next_taps);
        __builtin_prefetch(t1 + i + line.next_taps);
        __builtin_prefetch(t2 + i + line.next_taps);
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
GSPN_INLINE void backward_pixel(const BackwardLine<A>& line, int64_t p) {
  const int64_t m = line.m, at = p * m;
  const A *grad = line.grad.position(p), *x = line.x.position(p), *lam = line.lam.position(p);
  const A *carry = line.carry + at, *prev = line.prev + at;
  A *dx = line.dx.position(p), *dlam = line.dlam.position(p);
  A *q0 = line.q[0] + at, *q1 = line.q[1] + at, *q2 = line.q[2] + at;
  A t0 = 0, t1 = 0, t2 = 0;
  if constexpr (kHasPrev) {
    t0 = *line.taps.position(0, p), t1 = *line.taps.position(1, p), t2 = *line.taps.position(2, p);
  }
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
    *line.dtaps[0].position(p) = s0 + sum_lanes<A>(d0);
    *line.dtaps[1].position(p) = s1 + sum_lanes<A>(d1);
    *line.dtaps[2].position(p) = s2 + sum_lanes<A>(d2);
  }
}

template <class A, bool kHasLam, bool kNeedLam, bool kNeedTaps, bool kHasPrev>
void backward_line_of(const BackwardLine<A>& line) {
  const int64_t m = line.m;
  if (line.scalar_taps) {
    for (int64_t p = 0; p < line.cross; ++p) backward_pixel<A, kHasLam, kNeedLam, kNeedTaps, kHasPrev>(line, p);
  } else {
    const bool dense = line.grad.cross == m && line.dx.cross == m && (!kHasLam || line.lam.cross == m) &&
                       (!kNeedLam || (line.x.cross == m && line.dlam.cross == m)) &&
                       (!kHasPrev || line.taps.cross == m) && (!kHasPrev || !kNeedTaps || line.dtaps[0].cross == m);
    const int64_t positions = dense ? 1 : line.cross, count = dense ? line.cross * m : m;
    for (int64_t p = 0; p < positions; ++p) {
      if (kNeedTaps && line.add_dtaps) {
        backward_run<A, kHasLam, kNeedLam, kNeedTaps, kHasPrev, kNeedTaps>(line, p, count);
      } else {
        backward_run<A, kHasLam, kNeedLam, kNeedTaps, kHasPrev, false>(line, p, count);
      }
    }
  }
}

// Taps that reach outside, and all taps of a first line, weigh nothing: their gradient is 0, even beside a NaN.
template <class A>
void clear_taps_without_neighbour(const BackwardLine<A>& line) {
  const int64_t width = line.scalar_taps ? 1 : line.m;
  if (line.has_prev) {
    clear(line.dtaps[0].data, width);
    clear(line.dtaps[2].position(line.cross - 1), width);
  } else if (!line.add_dtaps) {
    for (const Lines<A>& dtap : line.dtaps) {
      const bool dense = dtap.cross == width;
      const int64_t positions = dense ? 1 : line.cross, count = dense ? line.cross * width : width;
      for (int64_t p = 0; p < positions; ++p) clear(dtap.position(p), count);
    }
  }
}

template <class A, bool kHasLam, bool kNeedLam>
void backward_line_with(const BackwardLine<A>& line, bool need_taps) {
  if (!line.has_prev) {
    backward_line_of<A, kHasLam, kNeedLam, false, false>(line);
  } else if (need_taps) {
    backward_line_of<A, kHasLam, kNeedLam, true, true>(line);
  } else {
    backward_line_of<A, kHasLam, kNeedLam, false, true>(line);
  }
  if (need_taps) clear_taps_without_neighbour(line);
}

template <class A>
void backward_line(const BackwardLine<A>& line, bool need_lam, bool need_taps) {
  if (!line.lam.data) {
    backward_line_with<A, false, false>(line, need_taps);
  } else if (need_lam) {
    backward_line_with<A, true, true>(line, need_taps);
  } else {
    backward_line_with<A, true, false>(line, need_taps);
  }
}

template <class A>
struct BackwardScratch {
  A *taps[3], *grad, *lam, *x, *dx, *dlam, *dtaps[3];
  A* h;               // the previous states of a range
  A *q[3], *carries;  // padded lines; a carry for each scan

  BackwardScratch(Scratch& scratch, const LineScanPlan& plan) {
    const int64_t staged = plan.tile * plan.pitch;
    for (A*& tap : taps) tap = scratch.take<A>(staged);
    grad = scratch.take<A>(staged), lam = scratch.take<A>(staged), x = scratch.take<A>(staged);
    dx = scratch.take<A>(staged), dlam = scratch.take<A>(staged);
    for (A*& dtap : dtaps) dtap = scratch.take<A>(staged);
    h = scratch.take<A>(staged);
    for (A*& line : q) line = scratch.take<A>(plan.pitch);
    carries = scratch.take<A>((plan.interleaved ? 1 : plan.block) * plan.pitch);
  }
};

// The states one step before each of the range's lines; those outside the image are never read. They are always staged,
// for the padding: a line in memory has its neighbours' data beyond its ends.
template <class T, class A>
void load_previous_states(const WorkItem<T>& item, int64_t channel, const LineRange& range, A* h) {
  const int64_t low = range.low - range.increment, high = low + range.count;
  const int64_t from = low < 0 ? 0 : low, until = minimum(high, item.call.lines);
  if (until <= from) return;
  gather(item.view(item.call.h, channel, from, until - from), h + (from - low) * item.plan.pitch, item.plan.pitch);
}

template <class T>
void backward(const LineScanCall& call, const LineScanPlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  const WorkItem<T> item(call, plan, index);
  const int64_t m = item.m, pitch = plan.pitch;
  const bool need_lam = call.dlam.data, need_taps = call.dtaps.image.data;
  Scratch pieces(memory);
  BackwardScratch<A> scratch(pieces, plan);
  for (A*& q : scratch.q) clear(q, pitch), q += m;
  clear(scratch.h, plan.tile * pitch);

  for (int64_t step = item.last_step; step > item.first_step;) {
    const LineRange range = item.range_until(step);
    const int64_t begin = range.first_step;
    const TapLines<A> taps(item, range, scratch.taps);
    const auto dtap = [&](int k) { return Output<T>(item.tap_view(call.dtaps, k, range), scratch.dtaps[k], pitch); };
    const Output<T> dtaps[3] = {dtap(0), dtap(1), dtap(2)};
    for (int64_t c = 0; c < item.scans(); ++c) {
      const auto view = [&](const Image& image) { return item.view(image, item.channel + c, range.low, range.count); };
      const Lines<A> grad = load_or_view(view(call.grad), scratch.grad, pitch);
      const Lines<A> lam = load_or_view(view(call.lam), scratch.lam, pitch);
      const Lines<A> x = need_lam ? load_or_view(view(call.x), scratch.x, pitch) : Lines<A>{};
      if (need_taps) load_previous_states(item, item.channel + c, range, scratch.h + m);
      const Output<T> dx(view(call.dx), scratch.dx, pitch), dlam(view(call.dlam), scratch.dlam, pitch);
      A* carry = scratch.carries + c * pitch;

      const auto at = [&](const Lines<A>& lines, int64_t l) {
        return Lines<A>{lines.at(l), -range.increment * lines.line, lines.cross};
      };
      BackwardLine<A> line{};
      line.cross = call.cross, line.m = m, line.scalar_taps = item.scalar_taps();
      line.add_dtaps = c > 0;
      line.next_taps = -range.increment * taps.tap[0].line;
      line.carry = carry;
      for (int j = 0; j < 3; ++j) line.q[j] = scratch.q[j];
      for (int64_t k = range.count - 1; k >= 0; --k) {
        const int64_t l = range.line(k);
        if (item.ends_segment(begin + k)) clear(carry, item.n);
        line.has_prev = !item.starts_segment(begin + k);
        line.grad = at(grad, l), line.x = at(x, l), line.lam = at(lam, l), line.taps = taps.at(l);
        line.prev = scratch.h + l * pitch + m;
        line.dx = at(dx.lines, l), line.dlam = at(dlam.lines, l);
        for (int j = 0; j < 3; ++j) {
          line.dtaps[j] = at(dtaps[j].lines, l);
          if (plan.partials) line.dtaps[j] = {item.partial_taps(j) + (range.low + l) * call.cross, 0, 1};
        }
        backward_line(line, need_lam, need_taps);
        if (line.has_prev) gather_carry<A>(item.n, m, scratch.q, carry);
      }
      dx.flush();
      dlam.flush();
    }
    if (!plan.partials) {
      for (const auto& d : dtaps) d.flush();
    }
    step = begin;
  }
}

template <class T>
void merge_taps(const LineScanCall& all, const LineScanPlan& plan, int64_t index) {
  using A = typename StateOf<T>::type;
  const int64_t batch = index / all.groups, group = index % all.groups;
  const int64_t plane = plan.pixels, stride = all.batch * all.groups * 3 * plane;
  LineScanCall memory;
  const LineScanCall& call = all.of_image(batch, memory);
  const Image& image = call.dtaps.image;
  const int64_t slow = plan.columns ? call.cross : call.lines, fast = plan.columns ? call.lines : call.cross;
  const int64_t slow_stride = plan.columns ? image.column : image.row,
                fast_stride = plan.columns ? image.row : image.column;
  for (int64_t k = 0; k < 3; ++k) {
    const A* parts = static_cast<const A*>(plan.partials) + (index * 3 + k) * plane;
    T* out = static_cast<T*>(image.data) + batch * image.batch + group * image.channel + k * call.dtaps.tap;
    for (int64_t i = 0; i < slow; ++i) {
      for (int64_t j = 0; j < fast; ++j) {
        A sum = 0;
        for (int64_t block = 0; block < plan.blocks; ++block) sum += parts[block * stride + i * fast + j];
        out[i * slow_stride + j * fast_stride] = narrow<T>(sum);
      }
    }
  }
}

}  // namespace

extern const LineScanKernel line_scan_backward, line_scan_merge_taps;
const LineScanKernel line_scan_backward = {
    [](const LineScanCall& call, const LineScanPlan& plan, int64_t item, char* scratch) {
      LineScanCall memory;
      const LineScanCall& own = call.of_image(plan.image_of(call, item), memory);
      dispatch_on_dtype(call.dtype, [&](auto type) {
        using T = decltype(type);
        plan.columns ? backward_columns<T>(own, plan, item, scratch) : backward<T>(own, plan, item, scratch);
        WorkItem<T>(own, plan, item).clear_padding_of_outputs(call, item);
      });
    },
    [](const LineScanCall& call, const LineScanPlan& plan) {
      return dispatch_on_dtype(call.dtype, [&](auto type) {
        using A = typename StateOf<decltype(type)>::type;
        return plan.columns ? scratch_bytes<BackwardColumnsScratch<A>>(plan) : scratch_bytes<BackwardScratch<A>>(plan);
      });
    },
};
const LineScanKernel line_scan_merge_taps = {
    [](const LineScanCall& call, const LineScanPlan& plan, int64_t item, char*) {
      dispatch_on_dtype(call.dtype, [&](auto type) { merge_taps<decltype(type)>(call, plan, item); });
    },
    nullptr,
};

}  // namespace gspn::GSPN_ISA
