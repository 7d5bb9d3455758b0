// The backward of one block of channels. Nothing but the arguments is kept from the forward: for each direction the
// states are computed again, into scratch, then the lines are walked the other way with the maps computed once more,
// but for the taps of the lines whose powers the first walk has kept.
//
// With g the adjoint state, c = sum_k w_k h_{i-1}[j+k-1] and t_k = -log2(e) a_k (taps.h):
//
//   g_i = u_i grad_i + sum_k (w_k g)_{i+1}[j-k+1]      du = grad h      dlam = x g      dx += lam g
//   dt_k = -ln(2) (1 - sigmoid(a_k)) w_k g (h_{i-1}[j+k-1] - c)
//
// and every map m = P p gives sum over its channels of P dm to the proxy and sum over pixels of dm p to P. Both
// products are taken for a few pixels at a time, while the maps' gradients are in the first-level cache.
#include "forward_line.h"

namespace gspn::GSPN_ISA {
namespace {

// Twice -ln(2), the factor of dt where deviations are halved.
template <class A>
constexpr A kHalvedGradient = static_cast<A>(-2 * 0.6931471805599453);

// Pixels whose maps' gradients are gathered before the two products are taken.
template <class A>
constexpr int kRun = (GSPN_VECTOR_BYTES == 64 ? 1 : 4) * kLanes<A>;

// Whether the proxy channels fill vectors, so that the proxy's gradient is summed with a lane for each of them.
template <class A, int S>
constexpr bool kProxyLanes = S > 0 && S % kLanes<A> == 0;

// --- Products of the maps' gradients ---

// The gradients of the maps of a run of at most kRun pixels, and what they are multiplied with and added to.
template <class A>
struct ProductRun {
  const A* maps;  // [output][kRun][lane]
  int64_t count;
  ProxyLine<A> proxy;
  A* dproxy;
  const A* weights;  // [proxy channel][output][lane], of which the maps are those from `from` on
  A* gradients;
  int outputs, from;
  const A* by_lane;                  // the same weights as [output][lane][proxy channel], see kProxyLanes
  typename VectorOf<A>::type* rows;  // kRun * proxy channels and a vector
};

// gradients[s][from + o] += sum over pixels of maps[o][pixel] proxy[pixel][s], for SB proxy channels from s on.
template <class A, int O, int SB>
GSPN_INLINE void add_to_weights(const ProductRun<A>& run, int64_t s) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  V acc[SB][O];
#pragma GCC unroll 8
  for (int i = 0; i < SB; ++i) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) acc[i][o] = load(run.gradients + ((s + i) * run.outputs + run.from + o) * L);
  }
  for (int64_t p = 0; p < run.count; ++p) {
    V map[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) map[o] = in_register(load(run.maps + (o * kRun<A> + p) * L));
#pragma GCC unroll 8
    for (int i = 0; i < SB; ++i) {
      const A value = run.proxy.at(p).data[s + i];
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) acc[i][o] += map[o] * value;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < SB; ++i) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) store(run.gradients + ((s + i) * run.outputs + run.from + o) * L, acc[i][o]);
  }
}

// rows[pixel * proxy channels + s] = sum_o maps[o][pixel] weights[s][from + o], a vector that is still to be summed.
template <class A, int O, int P>
GSPN_INLINE void maps_to_proxy(const ProductRun<A>& run, int64_t p, int64_t proxy_channels) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  V map[O][P];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) map[o][q] = load(run.maps + (o * kRun<A> + p + q) * L);
  }
  for (int64_t s = 0; s < proxy_channels; ++s) {
    V acc[P];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const V weight = load(run.weights + (s * run.outputs + run.from + o) * L);
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) acc[q] = o ? acc[q] + map[o][q] * weight : map[o][q] * weight;
    }
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) run.rows[(p + q) * proxy_channels + s] = acc[q];
  }
}

// The same summed, for P pixels of which `count` exist: dproxy[pixel][s] += sum_o sum_lane maps weights.
template <class A, int S, int O, int P>
GSPN_INLINE void maps_to_proxy_lanes(const ProductRun<A>& run, int64_t p, int64_t count) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>, N = S / L;
  V acc[P][N];
#pragma GCC unroll 8
  for (int q = 0; q < P; ++q) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[q][n] = V{};
  }
  const A* weights = run.by_lane + run.from * L * S;
  for (int o = 0; o < O; ++o) {
    const A* maps = run.maps + (o * kRun<A> + p) * L;
#pragma GCC unroll 1
    for (int lane = 0; lane < L; ++lane, weights += S) {
      V weight[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) weight[n] = in_register(load(weights + n * L));
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) {
        const V value = maps[q * L + lane] - V{};
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[q][n] += value * weight[n];
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < P; ++q) {
    if (q >= count) return;
    A* to = run.dproxy + (p + q) * run.proxy.cross;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(to + n * L, load(to + n * L) + acc[q][n]);
  }
}

// Both products of a run.
template <class A, int S, int O>
__attribute__((noinline)) void add_products(const ProductRun<A> run) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>, P = kPixels, most = O > 2 ? (GSPN_VECTOR_BYTES == 64 ? 4 : 2) : 8 / O;
  constexpr int SB = S && S < most ? S : most;
  const int64_t channels = S ? S : run.proxy.channels, count = run.count;
  int64_t s = 0;
  for (; s + SB <= channels; s += SB) add_to_weights<A, O, SB>(run, s);
  if constexpr (S == 0 || S % SB != 0) {
    for (; s < channels; ++s) add_to_weights<A, O, 1>(run, s);
  }

  if constexpr (kProxyLanes<A, S>) {
    constexpr int pixels = 8 * L / S;
    for (int64_t p = 0; p < count; p += pixels) maps_to_proxy_lanes<A, S, O, pixels>(run, p, count - p);
    return;
  }
  int64_t p = 0;
  for (; p + P <= count; p += P) maps_to_proxy<A, O, P>(run, p, channels);
  for (; p < count; ++p) maps_to_proxy<A, O, 1>(run, p, channels);
  const int64_t values = count * channels;
  for (int64_t i = values; i < (values + L - 1) / L * L; ++i) run.rows[i] = V{};
  alignas(64) A sums[L];
  int64_t pixel = 0, channel = 0;
  for (int64_t i = 0; i < values; i += L) {
    store(sums, sums_of_rows<A>(run.rows + i));
    if constexpr (S != 0 && L % (S ? S : 1) == 0) {
      for (int64_t j = 0; j < L / S && pixel < count; ++j, ++pixel) {
        A* to = run.dproxy + pixel * run.proxy.cross;
        for (int k = 0; k < S; ++k) to[k] += sums[j * S + k];
      }
    } else {
      for (int64_t j = 0; j < L && pixel < count; ++j) {
        run.dproxy[pixel * run.proxy.cross + channel] += sums[j];
        if (++channel == channels) channel = 0, ++pixel;
      }
    }
  }
}

// --- The adjoint line ---

template <class A>
struct BackwardLine {
  int64_t cross;
  const A *x, *grad;
  A* dx;
  int64_t stride;  // of x, grad and dx along the line
  ProxyLine<A> proxy;
  A* dproxy;
  const A* weights;
  A to_t;  // as in ForwardLine
  A* gradients;
  const A* taps;  // shared: [3][tap_pitch]
  int64_t tap_pitch;
  const A* tap_weights;   // shared: [3][proxy channel]
  A* tap_gradients;       // shared: [3][proxy channel][lane]
  const A *prev, *state;  // [cross][lane], padded
  const A* powers;        // as in ForwardLine, where they were kept and none is out of range; or null
  const A* from_next;     // [cross][tap][lane] w_k g of the line scanned next, padded; null where it starts a segment
  A* to_prev;             // the same of this line, written; unused on a segment's first line
  A* maps;                // [output][kRun][lane]
  A* tap_maps;            // shared: [3][kRun][lane]
  const A* by_lane;       // as in ProductRun
  typename VectorOf<A>::type* rows;
};

// Where a pixel's own taps come from: its logits, the powers that the first walk kept, or logits of any size.
enum class Taps { kLogits, kPowers, kAnyLogits };

// Taps, and (1 - sigmoid(a_k)) times the factor of dt, where all is in range.
template <class A>
GSPN_INLINE TapsAndSlopes<A> taps_and_slopes(Weights<A> weights, bool first, bool last) {
  using V = typename VectorOf<A>::type;
  TapsAndSlopes<A> out;
  // 1 - sigmoid(a_k) = e_k / d_k, by one division for all three.
  const V all = kHalvedGradient<A> / weights.product;
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) out.slope[k] = weights.e[k] * weights.w[k] * all;
  if (__builtin_expect(first, 0)) weights.w[0] = V{};
  if (__builtin_expect(last, 0)) weights.w[2] = V{};
  const V inverse = A(1) / weights.sum();
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) out.w[k] = weights.w[k] * inverse;
  return out;
}

// P pixels from p on, numbers `at` and following of their run. False, with nothing written, if their logits need the
// safe way.
template <class A, int S, int P, bool kShared, bool kPrev, Taps kTaps>
GSPN_INLINE bool backward_pixels(const BackwardLine<A>& line, int64_t p, int64_t at) {
  using V = typename VectorOf<A>::type;
  constexpr bool kOwnTaps = kPrev && !kShared, kProjectTaps = kOwnTaps && kTaps != Taps::kPowers;
  constexpr int L = kLanes<A>, outputs = kShared ? 2 : 5, from = kShared || kProjectTaps ? 0 : 3, O = outputs - from;
  constexpr int lam = kOwnTaps ? 3 : 0, u = lam + 1;  // among the maps whose gradients are written
  V acc[O][P];
  project<A, S, O, P>(line.weights, outputs, from, line.proxy.at(p), acc);
  TapsAndSlopes<A> taps[P];
  const auto is_first = [&](int q) { return p + q == 0; };
  const auto is_last = [&](int q) { return p + q == line.cross - 1; };
  if constexpr (kProjectTaps) {
    V worst, reach;
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      if constexpr (kTaps == Taps::kAnyLogits) {
        const V t[3] = {acc[0][q] * line.to_t, acc[1][q] * line.to_t, acc[2][q] * line.to_t};
        taps[q] = safe_taps<A>(t, lanes_where<A>(!is_first(q)), lanes_where<A>(!is_last(q)));
        for (V& slope : taps[q].slope) slope *= kHalvedGradient<A> * line.to_t;
      } else {
        const V t[3] = {acc[0][q], acc[1][q], acc[2][q]};
        const Weights<A> weights(t);
        worst = q ? worst + weights.product : weights.product;
        reach = q ? greater_of<A>(weights.reach, reach) : weights.reach;
        taps[q] = taps_and_slopes(weights, is_first(q), is_last(q));
      }
    }
    if constexpr (kTaps == Taps::kLogits) {
      if (__builtin_expect(out_of_range<A>(worst, reach), 0)) return false;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < P; ++q) {
    const int64_t pixel = p + q;
    const V grad = load(line.grad + pixel * line.stride);
    V g = acc[O - 1][q] * grad;
    if (const A* next = line.from_next) {
      next += 3 * pixel * L;
      g += load(next + 3 * L) + load(next + L) + load(next - L);
    }
    A* maps = line.maps + (at + q) * L;
    store(maps + u * kRun<A> * L, grad * load(line.state + pixel * L));
    store(maps + lam * kRun<A> * L, load(line.x + pixel * line.stride) * g);
    A* dx = line.dx + pixel * line.stride;
    store(dx, load(dx) + rounded(acc[O - 2][q] * g));
    if constexpr (kPrev) {
      const A* prev = line.prev + pixel * L;
      A* to_prev = line.to_prev + 3 * pixel * L;
      const V before[3] = {load(prev - L), load(prev), load(prev + L)};
      if constexpr (kShared) {
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          store(to_prev + k * L, g * line.taps[k * line.tap_pitch + pixel]);
          store(line.tap_maps + (k * kRun<A> + at + q) * L, g * before[k]);
        }
      } else {
        if constexpr (kTaps == Taps::kPowers) {
          taps[q] = taps_and_slopes(Weights<A>(line.powers + 3 * pixel * L), is_first(q), is_last(q));
        }
        const V *w = taps[q].w, *slope = taps[q].slope;
        // before_k - c from differences: the taps sum to one but for a rounding, and a single neighbour has no
        // gradient. Half of them, since the difference of two large states may overflow.
        const V half[3] = {before[0] * A(0.5), before[1] * A(0.5), before[2] * A(0.5)};
        const V down = half[0] - half[1], up = half[1] - half[2], across = half[0] - half[2];
        const V deviation[3] = {w[1] * down + w[2] * across, w[2] * up - w[0] * down,
                                V{} - (w[0] * across + w[1] * up)};
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          store(to_prev + k * L, w[k] * g);
          // Of a small tap and a large state the product must not vanish on the way.
          store(maps + k * kRun<A> * L, w[k] * slope[k] * (g * deviation[k]));
        }
      }
    }
  }
  return true;
}

template <class A>
__attribute__((noinline)) void backward_pixels_safely(const BackwardLine<A>& line, int64_t p, int64_t at,
                                                      int64_t count) {
  for (int64_t q = 0; q < count; ++q) backward_pixels<A, 0, 1, false, true, Taps::kAnyLogits>(line, p + q, at + q);
}

// The gradients of taps that all channels share, for a run of pixels from p on: one lane a pixel.
template <class A, int S>
void shared_tap_gradients(const BackwardLine<A>& line, int64_t p, int64_t at, int64_t count) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const int64_t proxy_channels = S ? S : line.proxy.channels;
  V t[3];
  shared_logits<A, S>(line.proxy, p, line.cross, line.tap_weights, line.to_t, t);
  const TapsAndSlopes<A> shared = shared_taps_at<A, true>(t, p, line.cross);
  const V* w = shared.w;
  V half[3];
  for (int k = 0; k < 3; ++k) {
    V rows[L];
    for (int64_t i = 0; i < L; ++i) rows[i] = i < count ? load(line.tap_maps + (k * kRun<A> + at + i) * L) : V{};
    half[k] = sums_of_rows<A>(rows) * A(0.5);
  }
  A lanes[L];
  for (int i = 0; i < L; ++i) lanes[i] = i < count ? kHalvedGradient<A> * line.to_t : A(0);
  const V scale = load(lanes);
  const V down = half[0] - half[1], up = half[1] - half[2], across = half[0] - half[2];
  const V deviation[3] = {w[1] * down + w[2] * across, w[2] * up - w[0] * down, V{} - (w[0] * across + w[1] * up)};
  V dt[3];
  for (int k = 0; k < 3; ++k) dt[k] = scale * w[k] * shared.slope[k] * deviation[k];
  for (int64_t from = 0; from < proxy_channels; from += L) {
    V values[L];
    const int64_t some = minimum(L, proxy_channels - from);
    transpose_proxy(line.proxy, p, line.cross, from, some, values);
    for (int64_t s = 0; s < some; ++s) {
      V to_proxy{};
      for (int k = 0; k < 3; ++k) {
        A* gradient = line.tap_gradients + (k * proxy_channels + from + s) * L;
        store(gradient, load(gradient) + dt[k] * values[s]);
        to_proxy += dt[k] * line.tap_weights[k * proxy_channels + from + s];
      }
      for (int64_t i = 0; i < count; ++i) line.dproxy[(p + i) * line.proxy.cross + from + s] += to_proxy[i];
    }
  }
}

template <class A, int S, bool kShared, bool kPrev, bool kKept>
void backward_line(const BackwardLine<A>& line) {
  constexpr int outputs = kShared ? 2 : 5, from = !kShared && !kPrev ? 3 : 0;
  const BackwardLine<A> copy = line;  // whose members no store can change: they are read once
  for (int64_t p = 0; p < line.cross; p += kRun<A>) {
    const int64_t count = minimum(kRun<A>, line.cross - p);
    const auto some = [&](auto number, int64_t i) __attribute__((always_inline)) {
      constexpr int P = decltype(number)::value;
      if constexpr (kPrev && !kShared) {
        const bool done = backward_pixels<A, S, P, false, true, kKept ? Taps::kPowers : Taps::kLogits>(copy, p + i, i);
        if (!done) backward_pixels_safely<A>(line, p + i, i, P);
      } else {
        backward_pixels<A, S, P, kShared, kPrev, Taps::kLogits>(copy, p + i, i);
      }
    };
    int64_t i = 0;
    if (kPrev && !kShared && line.to_t != A(1)) {
      backward_pixels_safely<A>(line, p, 0, count);
      i = count;
    }
    for (; i + kPixels <= count; i += kPixels) some(Number<kPixels>{}, i);
    for (; i < count; ++i) some(Number<1>{}, i);
    const ProductRun<A> run{line.maps,    count,          line.proxy.at(p), line.dproxy + p * line.proxy.cross,
                            line.weights, line.gradients, outputs,          from,
                            line.by_lane, line.rows};
    add_products<A, S, outputs - from>(run);
    if constexpr (kShared && kPrev) {
      for (int64_t at = 0; at < count; at += kLanes<A>) {
        shared_tap_gradients<A, S>(line, p + at, at, minimum(kLanes<A>, count - at));
      }
    }
  }
}

// --- A block ---

// Bytes of e_k that the first walk may keep for the second, which then neither projects the taps' logits nor takes
// their exponentials: about what a second-level cache has room for. They are those of the last lines, where the second
// walk begins; more would be written to memory and read again, which costs what it saves.
constexpr int64_t kMostPowers = int64_t{1} << 20;

template <class A>
struct BackwardScratch {
  A *x, *grad, *dx;  // images of the block
  A* states;         // of each step, with a position of zeros before and after
  A* powers;         // of the last steps, the very last first
  bool* in_range;    // of each step: whether no pixel's taps went the safe way
  A* lines[2];       // w_k g of this line and of the one scanned next, padded
  A *taps, *maps, *tap_maps;
  A* sums;  // of one line: added to the whole image's at its end, which keeps roundings few
  A* tap_sums;
  A* by_lane;  // the weights of a direction as [output][lane][proxy channel]
  typename VectorOf<A>::type* rows;

  BackwardScratch(Scratch& scratch, const PropagateCall& call) {
    constexpr int L = kLanes<A>;
    const int64_t longest = call.longest(), padding = 2 * longest;
    x = scratch.take<A>(call.pixels() * L);
    grad = scratch.take<A>(call.pixels() * L);
    dx = scratch.take<A>(call.pixels() * L);
    states = scratch.take<A>((call.pixels() + padding) * L);
    powers = scratch.take<A>(minimum(kMostPowers / static_cast<int64_t>(sizeof(A)), 3 * call.pixels() * L));
    in_range = scratch.take<bool>(longest);
    for (A*& line : lines) line = scratch.take<A>(3 * (longest + 2) * L);
    taps = scratch.take<A>(3 * (longest + L));
    maps = scratch.take<A>(5 * kRun<A> * L);
    tap_maps = scratch.take<A>(3 * kRun<A> * L);
    sums = scratch.take<A>(5 * call.proxy_channels * L);
    tap_sums = scratch.take<A>(3 * call.proxy_channels * L);
    by_lane = scratch.take<A>(5 * call.proxy_channels * L);
    rows = scratch.take<typename VectorOf<A>::type>(kRun<A> * call.proxy_channels + L);
  }
};

// Adds a line's sums to the image's and clears them.
template <class A>
GSPN_INLINE void add_up(A* sums, int64_t count, A* total) {
  using V = typename VectorOf<A>::type;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store(total + i, load(total + i) + load(sums + i));
    store(sums + i, V{});
  }
}

// One block of one batch entry.
template <class T, class A = typename StateOf<T>::type>
struct Backward {
  const PropagateCall& call;
  const PropagatePlan& plan;
  Channels channels;
  Packed<A> packed, gradients;
  A* dproxy;
  BackwardScratch<A> scratch;
  static constexpr int L = kLanes<A>;

  Backward(const PropagateCall& call, const PropagatePlan& plan, int64_t batch, int64_t block, A* dproxy,
           const BackwardScratch<A>& scratch)
      : call(call),
        plan(plan),
        channels(call, batch, block, L),
        packed(call, plan, block),
        gradients(Packed<A>::gradients(call, plan, batch, block)),
        dproxy(dproxy),
        scratch(scratch) {}

  TileLines<A> lines_of(A* data, const Walk& walk) const { return {tile_of(data), walk.columns}; }
  Tile<A> tile_of(A* data) const { return Tile<A>::by_rows(data, {0, call.height, 0, call.width}); }
  A* state_of(int64_t step, int64_t pitch) const { return scratch.states + step * pitch + L; }
  // Null for the steps whose powers are not kept.
  A* powers_of(int64_t step, const Walk& walk) const {
    const int64_t line = 3 * walk.cross * L, last = walk.lines - 1 - step;
    return (last + 1) * line * static_cast<int64_t>(sizeof(A)) <= kMostPowers ? scratch.powers + last * line : nullptr;
  }

  // Directions [first, last), and with the first of them the skip. Separate directions leave dx as a part.
  void run(int64_t first, int64_t last) const {
    read_block<T>(call.x, channels, tile_of(scratch.x));
    read_block<T>(call.grad, channels, tile_of(scratch.grad));
    if (plan.separate) {
      clear(scratch.dx, call.pixels() * L);
    } else {
      start_with_skip<A>(call, packed, channels.batch, tile_of(scratch.grad), tile_of(scratch.dx));
    }
    if (first == 0) {
      clear(gradients.skip(), call.proxy_channels * L);
      if (call.skip_proj) {
        dispatch_on_proxy_channels<A>(call.proxy_channels,
                                      [&](auto number) { skip_gradients<decltype(number)::value>(); });
      }
    }
    for (int64_t d = first; d < last; ++d) {
      clear(gradients.direction(d), gradients.direction_size());
      if (plan.shared) clear(gradients.taps(d), 3 * call.proxy_channels * L);
      dispatch_on_proxy_channels<A>(call.proxy_channels, [&](auto number) {
        constexpr int S = decltype(number)::value;
        plan.shared ? run_direction<S, true>(d) : run_direction<S, false>(d);
      });
    }
    if (!plan.separate) write_block<T>(tile_of(scratch.dx), call.dx, channels);
  }

  // Writes the weights of some outputs as ProductRun has them by lane, where they are read so.
  template <int S>
  void by_lane(const A* weights, int64_t outputs) const {
    if constexpr (kProxyLanes<A, S>) {
      for (int64_t i = 0; i < outputs * L; ++i) {
        for (int64_t s = 0; s < S; ++s) scratch.by_lane[i * S + s] = weights[s * outputs * L + i];
      }
    }
  }

  // The skip's gradients to its projection and the proxy.
  template <int S>
  void skip_gradients() const {
    const ProxyLines<A> proxies(call, channels.batch, false);
    by_lane<S>(packed.skip(), 1);
    for (int64_t row = 0; row < call.height; ++row) {
      const ProxyLine<A> proxy = proxies.at(row);
      A* to = dproxy + (proxy.data - proxies.data);
      for (int64_t p = 0; p < call.width; p += kRun<A>) {
        const int64_t count = minimum(kRun<A>, call.width - p), offset = (row * call.width + p) * L;
        for (int64_t i = 0; i < count * L; i += L) {
          store(scratch.maps + i, load(scratch.x + offset + i) * load(scratch.grad + offset + i));
        }
        add_products<A, S, 1>(ProductRun<A>{scratch.maps, count, proxy.at(p), to + p * proxy.cross, packed.skip(),
                                            scratch.sums, 1, 0, scratch.by_lane, scratch.rows});
      }
      add_up(scratch.sums, call.proxy_channels * L, gradients.skip());
    }
  }

  template <int S, bool kShared>
  void run_direction(int64_t d) const {
    const Walk walk(call, d);
    recompute_states<S, kShared>(d, walk);
    run_adjoint<S, kShared>(d, walk);
  }

  template <int S, bool kShared>
  void recompute_states(int64_t d, const Walk& walk) const {
    const TileLines<A> x = lines_of(scratch.x, walk);
    const ProxyLines<A> proxy(call, channels.batch, walk.columns);
    const int64_t pitch = (walk.cross + 2) * L;
    ForwardLine<A> line{};
    line.cross = walk.cross;
    line.x_cross = x.cross;
    line.weights = packed.direction(d), line.to_t = packed.to_t();
    line.taps = scratch.taps, line.tap_pitch = walk.cross + L;
    line.fetch = plan.fetch;
    for (int64_t step = 0; step < walk.lines; ++step) {
      const int64_t l = walk.line(step);
      line.x = x.at(l), line.proxy = proxy.at(l);
      line.state = state_of(step, pitch), line.prev = line.state - pitch, line.powers = powers_of(step, walk);
      clear(line.state - L, L);
      clear(line.state + walk.cross * L, L);
      if (walk.starts_segment(step)) {
        scratch.in_range[step] = forward_line<A, S, kShared, false, false>(line);
      } else {
        if constexpr (kShared) {
          shared_taps<A, S>(line.proxy, walk.cross, packed.taps(d), line.to_t, scratch.taps, line.tap_pitch);
        }
        scratch.in_range[step] = forward_line<A, S, kShared, true, false>(line);
      }
    }
  }

  template <int S, bool kShared>
  void run_adjoint(int64_t d, const Walk& walk) const {
    const TileLines<A> x = lines_of(scratch.x, walk), grad = lines_of(scratch.grad, walk),
                       dx = lines_of(scratch.dx, walk);
    const ProxyLines<A> proxy(call, channels.batch, walk.columns);
    const int64_t pitch = (walk.cross + 2) * L;
    for (A* padded : scratch.lines) clear(padded, 3 * pitch);
    BackwardLine<A> line{};
    line.cross = walk.cross;
    line.stride = x.cross;
    line.weights = packed.direction(d), line.to_t = packed.to_t(), line.gradients = scratch.sums;
    line.taps = scratch.taps, line.tap_pitch = walk.cross + L;
    line.tap_weights = packed.taps(d), line.tap_gradients = scratch.tap_sums;
    by_lane<S>(line.weights, packed.outputs);
    line.by_lane = scratch.by_lane;
    line.maps = scratch.maps, line.tap_maps = scratch.tap_maps, line.rows = scratch.rows;
    for (int64_t step = walk.lines - 1; step >= 0; --step) {
      const int64_t l = walk.line(step);
      const bool has_next = step + 1 < walk.lines && !walk.starts_segment(step + 1);
      line.x = x.at(l), line.grad = grad.at(l), line.dx = dx.at(l);
      line.proxy = proxy.at(l), line.dproxy = dproxy + (line.proxy.data - proxy.data);
      line.state = state_of(step, pitch), line.prev = line.state - pitch;
      line.powers = scratch.in_range[step] ? powers_of(step, walk) : nullptr;
      line.from_next = has_next ? scratch.lines[1 - step % 2] + 3 * L : nullptr;
      line.to_prev = scratch.lines[step % 2] + 3 * L;
      if (walk.starts_segment(step)) {
        backward_line<A, S, kShared, false, false>(line);
      } else {
        if constexpr (kShared) {
          shared_taps<A, S>(line.proxy, walk.cross, packed.taps(d), line.to_t, scratch.taps, line.tap_pitch);
        }
        !kShared&& line.powers ? backward_line<A, S, kShared, true, !kShared>(line)
                               : backward_line<A, S, kShared, true, false>(line);
      }
      add_up(scratch.sums, packed.direction_size(), gradients.direction(d));
      if (kShared) add_up(scratch.tap_sums, 3 * call.proxy_channels * L, gradients.taps(d));
    }
  }
};

// An item is a run of blocks of one batch entry, which add to one part of the proxy's gradient one after the other; or,
// separate, one direction of one block, whose dx goes to a part as well.
template <class T>
void backward(const PropagateCall& all, const PropagatePlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  const int64_t chunk = index % plan.chunks, batch = index / plan.chunks;
  PropagateCall own;
  const PropagateCall& call = all.of_image(batch, own);
  const int64_t values = call.proxy_image;
  A* dproxy = static_cast<A*>(plan.proxy_parts) + (chunk * call.batch + batch) * values;
  clear(dproxy, values);
  Scratch pieces(memory);
  BackwardScratch<A> scratch(pieces, call);
  clear(scratch.sums, 5 * call.proxy_channels * kLanes<A>);
  clear(scratch.tap_sums, 3 * call.proxy_channels * kLanes<A>);
  if (plan.separate) {
    const int64_t d = chunk % call.direction_count, block = chunk / call.direction_count;
    scratch.dx =
        static_cast<A*>(plan.parts) + ((d * call.batch + batch) * plan.blocks + block) * plan.pixels * kLanes<A>;
    Backward<T>(call, plan, batch, block, dproxy, scratch).run(d, d + 1);
    return;
  }
  for (int64_t block = plan.blocks * chunk / plan.chunks; block < plan.blocks * (chunk + 1) / plan.chunks; ++block) {
    const Backward<T> all_directions(call, plan, batch, block, dproxy, scratch);
    all_directions.run(0, call.direction_count);
    clear_padding_of<T>(all, call, call.dx, all_directions.channels);
  }
}

}  // namespace

extern const PropagateKernel propagate_backward;
const PropagateKernel propagate_backward = {
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t item, char* scratch) {
      dispatch_on_dtype(call.dtype, [&](auto type) { backward<decltype(type)>(call, plan, item, scratch); });
    },
    [](const PropagateCall& call, const PropagatePlan&) {
      return dispatch_on_state(call.dtype,
                               [&](auto state) { return scratch_bytes<BackwardScratch<decltype(state)>>(call); });
    },
};

}  // namespace gspn::GSPN_ISA
