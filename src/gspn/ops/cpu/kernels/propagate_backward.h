// The backward of one block of channels. Nothing but the arguments is kept from the forward: for each direction the states
// are computed again, into scratch, then the lines are walked the other way with the maps computed once more.
//
// With g the adjoint state, c = sum_k w_k h_{i-1}[j+k-1] and t_k = -log2(e) a_k (taps.h):
//
//   g_i = u_i grad_i + sum_k (w_k g)_{i+1}[j-k+1]      du = grad h      dlam = x g      dx += lam g
//   dt_k = -ln(2) (1 - sigmoid(a_k)) w_k g (h_{i-1}[j+k-1] - c)
//
// and every map m = P p gives sum over its channels of P dm to the proxy and sum over pixels of dm p to P. Both products
// are taken for a few pixels at a time, while the maps' gradients are in the first-level cache.
#pragma once

#include "propagate_forward.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

constexpr double kLn2 = 0.6931471805599453;

// Pixels whose maps' gradients are gathered before the two products are taken.
template <class A>
constexpr int kRun = kLanes<A>;

// Where a block's gradients of projections go, laid out as Packed, with a vector of partial sums for each shared tap.
template <class A>
struct PackedGradients {
  static constexpr int L = kLanes<A>;
  A* base;
  int64_t directions, states, outputs;
  PackedGradients(const PropagateCall& call, const PropagatePlan& plan, int64_t batch, int64_t block)
      : base(static_cast<A*>(plan.weight_parts) + (batch * plan.blocks + block) * plan.weight_size),
        directions(call.directions),
        states(call.states),
        outputs(plan.shared ? 2 : 5) {}
  GSPN_INLINE A* direction(int64_t d) const { return base + d * states * outputs * L; }
  GSPN_INLINE A* skip() const { return direction(directions); }
  GSPN_INLINE A* taps(int64_t d) const { return skip() + states * L + d * 3 * states * L; }
};

// --- Products of the maps' gradients --------------------------------------------------------------------------------------

// gradients[s][from + o] += sum over pixels of maps[o][pixel] proxy[pixel][s], for SB states from s on.
template <class A, int O, int SB>
GSPN_INLINE void add_to_weights(const A* maps, int64_t count, const A* proxy, int64_t p_cross, int64_t s, int outputs,
                                int from, A* gradients) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  V acc[SB][O];
#pragma GCC unroll 8
  for (int i = 0; i < SB; ++i) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) acc[i][o] = load(gradients + ((s + i) * outputs + from + o) * L);
  }
  for (int64_t p = 0; p < count; ++p) {
    V map[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) map[o] = load(maps + (o * kRun<A> + p) * L);
#pragma GCC unroll 8
    for (int i = 0; i < SB; ++i) {
      const A value = proxy[p * p_cross + s + i];
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) acc[i][o] += map[o] * value;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < SB; ++i) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) store(gradients + ((s + i) * outputs + from + o) * L, acc[i][o]);
  }
}

// rows[pixel * states + s] = sum_o maps[o][pixel] weights[s][from + o], lanes still apart.
template <class A, int O, int P>
GSPN_INLINE void maps_to_states(const A* maps, int64_t p, const A* weights, int64_t states, int outputs, int from,
                                typename VectorOf<A>::type* rows) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  V map[O][P];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) map[o][q] = load(maps + (o * kRun<A> + p + q) * L);
  }
  for (int64_t s = 0; s < states; ++s) {
    V acc[P];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const V weight = load(weights + (s * outputs + from + o) * L);
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) acc[q] = o ? acc[q] + map[o][q] * weight : map[o][q] * weight;
    }
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) rows[(p + q) * states + s] = acc[q];
  }
}

// Both products for a run of at most kRun pixels. `rows` holds kRun * states vectors.
template <class A, int S, int O>
GSPN_INLINE void add_products(const A* maps, int64_t count, const A* proxy, A* dproxy, int64_t p_cross, int64_t any_states,
                              const A* weights, A* gradients, int outputs, int from, typename VectorOf<A>::type* rows) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>, P = GSPN_VECTOR_BYTES == 64 ? 4 : 2, SB = GSPN_VECTOR_BYTES == 64 && O > 1 ? 4 : 2;
  const int64_t states = S ? S : any_states;
  int64_t s = 0;
  for (; s + SB <= states; s += SB) add_to_weights<A, O, SB>(maps, count, proxy, p_cross, s, outputs, from, gradients);
  for (; s < states; ++s) add_to_weights<A, O, 1>(maps, count, proxy, p_cross, s, outputs, from, gradients);

  int64_t p = 0;
  for (; p + P <= count; p += P) maps_to_states<A, O, P>(maps, p, weights, states, outputs, from, rows);
  for (; p < count; ++p) maps_to_states<A, O, 1>(maps, p, weights, states, outputs, from, rows);
  const int64_t values = count * states;
  for (int64_t i = values; i < (values + L - 1) / L * L; ++i) rows[i] = V{};
  alignas(64) A sums[L];
  int64_t pixel = 0, state = 0;
  for (int64_t i = 0; i < values; i += L) {
    const V sum = sums_of_rows<A>(rows + i);
    if constexpr (S != 0 && L % (S ? S : 1) == 0) {
      store(sums, sum);
      for (int64_t j = 0; j < L / S && pixel < count; ++j, ++pixel) {
        A* to = dproxy + pixel * p_cross;
        for (int k = 0; k < S; ++k) to[k] += sums[j * S + k];
      }
    } else {
      store(sums, sum);
      for (int64_t j = 0; j < L && pixel < count; ++j) {
        dproxy[pixel * p_cross + state] += sums[j];
        if (++state == states) state = 0, ++pixel;
      }
    }
  }
}

// --- The adjoint line -----------------------------------------------------------------------------------------------------

template <class A>
struct BackwardLineOf {
  int64_t cross, states;
  const A *x, *grad;
  A* dx;
  int64_t stride;  // of x, grad and dx along the line
  const A* proxy;
  A* dproxy;
  int64_t p_cross;
  const A* weights;
  A* gradients;
  const A* taps;         // shared: [3][tap_pitch]
  int64_t tap_pitch;
  const A* tap_weights;  // shared: [3][states]
  A* tap_gradients;      // shared: [3][states][lane]
  const A *prev, *state;  // [cross][lane], padded
  const A* back[3];       // w_k g of the line scanned next, padded; null where it starts a segment
  A* ahead[3];            // the same of this line, written; unused on a segment's first line
  A* maps;                // [output][kRun][lane]
  A* tap_maps;            // shared: [3][kRun][lane]
  typename VectorOf<A>::type* rows;
};

// P pixels from p on, numbers `at` and following of their run. False, with nothing written, if their logits need the safe
// way.
template <class A, int S, int P, bool kShared, bool kPrev, bool kSafe>
GSPN_INLINE bool backward_pixels(const BackwardLineOf<A>& line, int64_t p, int64_t at) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>, outputs = kShared ? 2 : 5, from = !kShared && !kPrev ? 3 : 0, O = outputs - from;
  V acc[O][P];
  project<A, S, O, P>(line.weights, outputs, from, line.proxy + p * line.p_cross, line.p_cross, line.states, acc);
  V w[3][P], slope[3][P];
  if constexpr (kPrev && !kShared) {
    V worst{};
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      const bool first = p + q == 0, last = p + q == line.cross - 1;
      V t[3] = {acc[0][q], acc[1][q], acc[2][q]};
      if constexpr (kSafe) settle<A>(t, lanes_where<A>(!first), lanes_where<A>(!last));
      Weights<A> weights(t);
      worst += weights.product;
      // 1 - sigmoid(a_k) = e_k / d_k, by one division for all three where their product does not overflow.
      const V all = kSafe ? V{} : A(1) / weights.product;
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        slope[k][q] = kSafe ? weights.e[k] / (weights.e[k] + A(1)) : weights.e[k] * weights.w[k] * all;
      }
      if (__builtin_expect(first, 0)) weights.w[0] = V{};
      if (__builtin_expect(last, 0)) weights.w[2] = V{};
      const V inverse = A(1) / weights.sum();
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) w[k][q] = weights.w[k] * inverse;
    }
    if constexpr (!kSafe) {
      if (__builtin_expect(any_beyond<A>(worst, TapRange<A>::overflow), 0)) return false;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < P; ++q) {
    const int64_t pixel = p + q;
    const V grad = load(line.grad + pixel * line.stride);
    V g = acc[O - 1][q] * grad;
    if (line.back[0]) {
      g += load(line.back[0] + (pixel + 1) * L) + load(line.back[1] + pixel * L) + load(line.back[2] + (pixel - 1) * L);
    }
    A* maps = line.maps + (at + q) * L;
    store(maps + (O - 1) * kRun<A> * L, grad * load(line.state + pixel * L));
    store(maps + (O - 2) * kRun<A> * L, load(line.x + pixel * line.stride) * g);
    A* dx = line.dx + pixel * line.stride;
    store(dx, load(dx) + rounded(acc[O - 2][q] * g));
    if constexpr (kPrev) {
      const A* prev = line.prev + pixel * L;
      const V before[3] = {load(prev - L), load(prev), load(prev + L)};
      if constexpr (kShared) {
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          store(line.ahead[k] + pixel * L, g * line.taps[k * line.tap_pitch + pixel]);
          store(line.tap_maps + (k * kRun<A> + at + q) * L, g * before[k]);
        }
      } else {
        // before_k - c from differences: the taps sum to one but for a rounding, and a single neighbour has no gradient.
        const V down = before[0] - before[1], up = before[1] - before[2], across = before[0] - before[2];
        const V apart[3] = {w[1][q] * down + w[2][q] * across, w[2][q] * up - w[0][q] * down,
                            V{} - (w[0][q] * across + w[1][q] * up)};
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          const V part = w[k][q] * g;
          store(line.ahead[k] + pixel * L, part);
          store(maps + k * kRun<A> * L, part * slope[k][q] * apart[k] * static_cast<A>(-kLn2));
        }
      }
    }
  }
  return true;
}

template <class A, int S, int P, bool kShared, bool kPrev>
__attribute__((noinline)) void backward_pixels_safely(const BackwardLineOf<A>& line, int64_t p, int64_t at) {
  for (int q = 0; q < P; ++q) backward_pixels<A, S, 1, kShared, kPrev, true>(line, p + q, at + q);
}

// The gradients of taps that all channels share, for a run of pixels from p on: one lane a pixel.
template <class A, int S>
void shared_tap_gradients(const BackwardLineOf<A>& line, int64_t p, int64_t count) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const int64_t states = S ? S : line.states;
  V t[3];
  logits_of<A, S>(line.proxy, line.p_cross, p, line.cross, line.states, line.tap_weights, t);
  const Weights<A> found = shared_weights<A>(t, p, line.cross);
  const V inverse = A(1) / found.sum();
  V dw[3], w[3];
  for (int k = 0; k < 3; ++k) {
    V run[L];
    for (int64_t i = 0; i < L; ++i) run[i] = i < count ? load(line.tap_maps + (k * kRun<A> + i) * L) : V{};
    dw[k] = sums_of_rows<A>(run);
    w[k] = found.w[k] * inverse;
  }
  A lanes[L];
  for (int i = 0; i < L; ++i) lanes[i] = i < count ? static_cast<A>(-kLn2) : A(0);
  const V scale = load(lanes);
  const V down = dw[0] - dw[1], up = dw[1] - dw[2], across = dw[0] - dw[2];
  const V apart[3] = {w[1] * down + w[2] * across, w[2] * up - w[0] * down, V{} - (w[0] * across + w[1] * up)};
  V dt[3];
  for (int k = 0; k < 3; ++k) {
    dt[k] = scale * w[k] * (found.e[k] / (found.e[k] + A(1))) * apart[k];
  }
  for (int64_t from = 0; from < states; from += L) {
    V turned[L];
    const int64_t some = least_of(L, states - from);
    turn_states(line.proxy, line.p_cross, p, line.cross, from, some, turned);
    for (int64_t s = 0; s < some; ++s) {
      V to_proxy{};
      for (int k = 0; k < 3; ++k) {
        A* gradient = line.tap_gradients + (k * states + from + s) * L;
        store(gradient, load(gradient) + dt[k] * turned[s]);
        to_proxy += dt[k] * line.tap_weights[k * states + from + s];
      }
      for (int64_t i = 0; i < count; ++i) line.dproxy[(p + i) * line.p_cross + from + s] += to_proxy[i];
    }
  }
}

template <class A, int S, bool kShared, bool kPrev>
void backward_line_of(const BackwardLineOf<A>& line) {
  constexpr int outputs = kShared ? 2 : 5, from = !kShared && !kPrev ? 3 : 0, O = outputs - from;
  for (int64_t p = 0; p < line.cross; p += kRun<A>) {
    const int64_t count = least_of(kRun<A>, line.cross - p);
    int64_t i = 0;
    for (; i + kPixels <= count; i += kPixels) {
      if (!backward_pixels<A, S, kPixels, kShared, kPrev, false>(line, p + i, i)) {
        backward_pixels_safely<A, S, kPixels, kShared, kPrev>(line, p + i, i);
      }
    }
    for (; i < count; ++i) {
      if (!backward_pixels<A, S, 1, kShared, kPrev, false>(line, p + i, i)) {
        backward_pixels_safely<A, S, 1, kShared, kPrev>(line, p + i, i);
      }
    }
    add_products<A, S, O>(line.maps, count, line.proxy + p * line.p_cross, line.dproxy + p * line.p_cross, line.p_cross,
                          line.states, line.weights, line.gradients, outputs, from, line.rows);
    if constexpr (kShared && kPrev) shared_tap_gradients<A, S>(line, p, count);
  }
}

// --- A block ----------------------------------------------------------------------------------------------------------

// Scratch of the backward, in elements of the state's type. Pictures of a block: x, grad, dx and the states.
template <class A>
struct BackwardScratch {
  A *x, *grad, *dx, *states, *lines, *taps, *maps, *tap_maps;
  A* sums;  // of one line, [8 at most][states][lane]: added to the whole picture's at its end, which keeps roundings few
  typename VectorOf<A>::type* rows;
  BackwardScratch(const PropagateCall& call, char* memory) {
    constexpr int L = kLanes<A>;
    const int64_t pixels = call.height * call.width, longest = call.height > call.width ? call.height : call.width;
    const int64_t both = call.height + call.width;
    Scratch scratch(memory);
    x = scratch.take<A>(pixels * L);
    grad = scratch.take<A>(pixels * L);
    dx = scratch.take<A>(pixels * L);
    states = scratch.take<A>((pixels + 2 * both) * L);
    lines = scratch.take<A>(6 * (longest + 2) * L);
    taps = scratch.take<A>(4 * (longest + L));
    maps = scratch.take<A>(5 * kRun<A> * L);
    tap_maps = scratch.take<A>(3 * kRun<A> * L);
    sums = scratch.take<A>(8 * call.states * L);
    rows = reinterpret_cast<typename VectorOf<A>::type*>(scratch.take<A>((kRun<A> * call.states + L) * L));
  }
};

// Adds a line's sums to the picture's and clears them.
template <class A>
GSPN_INLINE void add_up(A* sums, int64_t count, A* total) {
  using V = typename VectorOf<A>::type;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store(total + i, load(total + i) + load(sums + i));
    store(sums + i, V{});
  }
}

template <class A, int S, bool kShared>
void backward_direction(const PropagateCall& call, const Packed<A>& packed, const PackedGradients<A>& gradients, int64_t d,
                        int64_t batch, A* dproxy, const BackwardScratch<A>& scratch, bool fetch) {
  constexpr int L = kLanes<A>;
  const Walk walk(call, call.towards[d]);
  const Rectangle all{0, call.height, 0, call.width};
  const auto staged = [&](A* data) { return Staged<A>(Tile<A>::by_rows(data, all), walk.columns); };
  const Staged<A> x = staged(scratch.x), grad = staged(scratch.grad), dx = staged(scratch.dx);
  const ProxyLines<A> proxy(call, batch, walk.columns);
  const int64_t pitch = (walk.cross + 2) * L;

  // States of step s at states + s * pitch, with a position of zeros before and after.
  ForwardLine<A> forward{};
  forward.cross = walk.cross, forward.states = call.states;
  forward.x_cross = x.cross, forward.p_cross = proxy.cross;
  forward.weights = packed.direction(d), forward.taps = scratch.taps;
  forward.tap_pitch = walk.cross + L;
  forward.fetch = fetch;
  for (int64_t step = 0; step < walk.lines; ++step) {
    const int64_t l = walk.line(step);
    A* line = scratch.states + step * pitch;
    memset(line, 0, L * sizeof(A));
    memset(line + pitch - L, 0, L * sizeof(A));
    forward.x = x.at(l), forward.proxy = proxy.at(l);
    forward.state = line + L, forward.prev = line - pitch + L;
    if (step % walk.segment == 0) {
      forward_line<A, S, kShared, false, false>(forward);
    } else {
      if constexpr (kShared) {
        shared_taps<A, S>(forward.proxy, proxy.cross, walk.cross, call.states, packed.taps(d), scratch.taps,
                          forward.tap_pitch);
      }
      forward_line<A, S, kShared, true, false>(forward);
    }
  }

  memset(scratch.lines, 0, static_cast<size_t>(6 * pitch) * sizeof(A));
  BackwardLineOf<A> line{};
  line.cross = walk.cross, line.states = call.states;
  line.stride = x.cross, line.p_cross = proxy.cross;
  line.weights = packed.direction(d), line.gradients = scratch.sums;
  line.taps = scratch.taps, line.tap_pitch = forward.tap_pitch, line.tap_weights = packed.taps(d), line.tap_gradients = scratch.sums + 2 * call.states * L;
  line.maps = scratch.maps, line.tap_maps = scratch.tap_maps, line.rows = scratch.rows;
  for (int64_t step = walk.lines - 1; step >= 0; --step) {
    const int64_t l = walk.line(step);
    const bool has_prev = step % walk.segment != 0;
    const bool has_next = step + 1 < walk.lines && (step + 1) % walk.segment != 0;
    line.x = x.at(l), line.grad = grad.at(l), line.dx = dx.at(l);
    line.proxy = proxy.at(l), line.dproxy = dproxy + (line.proxy - proxy.data);
    line.state = scratch.states + step * pitch + L, line.prev = line.state - pitch;
    for (int k = 0; k < 3; ++k) {
      A* even = scratch.lines + k * pitch + L;
      A* odd = scratch.lines + (3 + k) * pitch + L;
      line.back[k] = has_next ? (step % 2 ? even : odd) : nullptr;
      line.ahead[k] = step % 2 ? odd : even;
    }
    if (has_prev) {
      if constexpr (kShared) {
        shared_taps<A, S>(line.proxy, proxy.cross, walk.cross, call.states, packed.taps(d), scratch.taps,
                          forward.tap_pitch);
      }
      backward_line_of<A, S, kShared, true>(line);
    } else {
      backward_line_of<A, S, kShared, false>(line);
    }
    add_up(scratch.sums, packed.outputs * call.states * L, gradients.direction(d));
    if (kShared) add_up(line.tap_gradients, 3 * call.states * L, gradients.taps(d));
  }
}

// The skip's gradients to its projection and the proxy.
template <class A, int S>
void backward_skip(const PropagateCall& call, const Packed<A>& packed, const PackedGradients<A>& gradients, int64_t batch,
                   A* dproxy, const BackwardScratch<A>& scratch) {
  constexpr int L = kLanes<A>;
  const ProxyLines<A> proxy(call, batch, false);
  for (int64_t row = 0; row < call.height; ++row) {
    const A* at = proxy.at(row);
    A* to = dproxy + (at - proxy.data);
    for (int64_t p = 0; p < call.width; p += kRun<A>) {
      const int64_t count = least_of(kRun<A>, call.width - p), offset = (row * call.width + p) * L;
      for (int64_t i = 0; i < count * L; i += L) {
        store(scratch.maps + i, load(scratch.x + offset + i) * load(scratch.grad + offset + i));
      }
      add_products<A, S, 1>(scratch.maps, count, at + p * call.states, to + p * call.states, call.states, call.states,
                            packed.skip(), scratch.sums, 1, 0, scratch.rows);
    }
    add_up(scratch.sums, call.states * L, gradients.skip());
  }
}

// Directions [first, last) of one block, and with the first of them the skip.
template <class T, class A = typename StateOf<T>::type>
void backward_block(const PropagateCall& call, const PropagatePlan& plan, int64_t batch, int64_t block, int64_t first,
                    int64_t last, A* dproxy, const BackwardScratch<A>& scratch) {
  constexpr int L = kLanes<A>;
  const Rectangle all{0, call.height, 0, call.width};
  const int64_t channel = block * L, count = least_of(L, call.channels - channel);
  const Packed<A> packed(plan.packed, plan.packed_size, block, call, plan.shared);
  const PackedGradients<A> gradients(call, plan, batch, block);
  const Tile<A> grad = Tile<A>::by_rows(scratch.grad, all), dx = Tile<A>::by_rows(scratch.dx, all);
  read_block<T>(call.x, batch, channel, count, Tile<A>::by_rows(scratch.x, all));
  read_block<T>(call.grad, batch, channel, count, grad);
  if (plan.apart) {
    memset(scratch.dx, 0, static_cast<size_t>(call.height * call.width * L) * sizeof(A));
  } else {
    start_with_skip<A>(call, packed, batch, grad, dx);
  }
  by_states(call.states, [&](auto number) {
    constexpr int S = decltype(number)::value;
    if (first == 0) {
      memset(gradients.skip(), 0, static_cast<size_t>(call.states * L) * sizeof(A));
      if (call.skip_proj) backward_skip<A, S>(call, packed, gradients, batch, dproxy, scratch);
    }
    for (int64_t d = first; d < last; ++d) {
      memset(gradients.direction(d), 0, static_cast<size_t>(gradients.outputs * call.states * L) * sizeof(A));
      if (plan.shared) {
        memset(gradients.taps(d), 0, static_cast<size_t>(3 * call.states * L) * sizeof(A));
        backward_direction<A, S, true>(call, packed, gradients, d, batch, dproxy, scratch, plan.fetch);
      } else {
        backward_direction<A, S, false>(call, packed, gradients, d, batch, dproxy, scratch, plan.fetch);
      }
    }
  });
  if (!plan.apart) write_block<T>(dx, call.dx, batch, channel, count);
}

// An item is a run of blocks of one batch entry, which add to one part of the proxy's gradient one after the other; or,
// apart, one direction of one block, whose dx goes to a part as well.
template <class T>
void propagate_backward(const PropagateCall& call, const PropagatePlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  const int64_t chunk = index % plan.chunks, batch = index / plan.chunks;
  const int64_t pixels = call.height * call.width;
  const int64_t values = call.height * call.proxy_row;
  A* dproxy = static_cast<A*>(plan.proxy_parts) + (chunk * call.batch + batch) * values;
  memset(dproxy, 0, static_cast<size_t>(values) * sizeof(A));
  BackwardScratch<A> scratch(call, memory);
  memset(scratch.sums, 0, static_cast<size_t>(8 * call.states * kLanes<A>) * sizeof(A));
  if (plan.apart) {
    const int64_t d = chunk % call.directions, block = chunk / call.directions;
    scratch.dx = static_cast<A*>(plan.parts) + ((d * call.batch + batch) * plan.blocks + block) * pixels * kLanes<A>;
    backward_block<T>(call, plan, batch, block, d, d + 1, dproxy, scratch);
    return;
  }
  for (int64_t block = plan.blocks * chunk / plan.chunks; block < plan.blocks * (chunk + 1) / plan.chunks; ++block) {
    backward_block<T>(call, plan, batch, block, 0, call.directions, dproxy, scratch);
  }
}

// --- What items have apart --------------------------------------------------------------------------------------------

template <class A>
void merge_proxy(const PropagateCall& call, const PropagatePlan& plan, int64_t batch) {
  const int64_t values = call.height * call.proxy_row;
  const A* parts = static_cast<const A*>(plan.proxy_parts) + batch * values;
  A* out = static_cast<A*>(call.dproxy) + batch * values;
  for (int64_t i = 0; i < values; ++i) out[i] = parts[i];
  for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
    const A* part = parts + chunk * call.batch * values;
    for (int64_t i = 0; i < values; ++i) out[i] += part[i];
  }
}

// Sums over the batch, and for taps over the channels that share them, in the order of the channels.
template <class A>
void merge_weights(const PropagateCall& call, const PropagatePlan& plan) {
  constexpr int L = kLanes<A>;
  const int64_t S = call.states, per_group = call.channels / call.groups;
  const A scale = static_cast<A>(-kLog2E);
  A* dtap = static_cast<A*>(call.dtap_proj);
  A* gates[2] = {static_cast<A*>(call.dlam_proj), static_cast<A*>(call.du_proj)};
  A* dskip = static_cast<A*>(call.dskip_proj);
  memset(dtap, 0, static_cast<size_t>(call.directions * call.groups * 3 * S) * sizeof(A));
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const PackedGradients<A> sum(call, plan, 0, block);
    for (int64_t batch = 1; batch < call.batch; ++batch) {
      const PackedGradients<A> part(call, plan, batch, block);
      for (int64_t i = 0; i < plan.weight_size; i += L) store(sum.base + i, load(sum.base + i) + load(part.base + i));
    }
    const int64_t first = block * L, count = least_of(L, call.channels - first);
    for (int64_t d = 0; d < call.directions; ++d) {
      const A* in = sum.direction(d);
      for (int64_t s = 0; s < S; ++s, in += sum.outputs * L) {
        for (int64_t c = 0; c < count; ++c) {
          const int64_t channel = first + c;
          for (int64_t o = 0; o < 2; ++o) gates[o][(d * call.channels + channel) * S + s] = in[(sum.outputs - 2 + o) * L + c];
          if (plan.shared) continue;
          for (int64_t k = 0; k < 3; ++k) {
            dtap[((d * call.groups + channel / per_group) * 3 + k) * S + s] += scale * in[k * L + c];
          }
        }
      }
      if (!plan.shared) continue;
      A* out = dtap + (d * call.groups + first / per_group) * 3 * S;
      for (int64_t i = 0; i < 3 * S; ++i) {
        const A* lanes = sum.taps(d) + i * L;
        A total = 0;
        for (int l = 0; l < L; ++l) total += lanes[l];
        out[i] += scale * total;
      }
    }
    if (dskip) {
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t c = 0; c < count; ++c) dskip[(first + c) * S + s] = sum.skip()[s * L + c];
      }
    }
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
