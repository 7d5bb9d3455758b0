// What the forward and the backward of one block of channels share: the packed projections, the walk over lines, the taps
// of a line that all channels share.
#pragma once

#include "channel_blocks.h"
#include "propagate.h"
#include "staging.h"
#include "taps.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

GSPN_INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Pixels computed together, so that a projection's vector is loaded once for all of them.
constexpr int kPixels = GSPN_VECTOR_BYTES == 64 ? 4 : 2;

// The packed projections of a block. Channels beyond the last have zeros.
//
//   [direction][state][output][lane]  with outputs tap 0, 1, 2 (scaled, see taps.h), lam, u; lam and u alone if shared
//   [state][lane]                     the skip
//   [direction][tap][state]           the scaled taps, if shared
template <class A>
struct Packed {
  static constexpr int L = kLanes<A>;
  A* base;
  int64_t directions, states, outputs;

  Packed(void* all, int64_t size, int64_t block, const PropagateCall& call, bool shared)
      : base(static_cast<A*>(all) + block * size), directions(call.directions), states(call.states), outputs(shared ? 2 : 5) {}
  GSPN_INLINE A* direction(int64_t d) const { return base + d * states * outputs * L; }
  GSPN_INLINE A* skip() const { return direction(directions); }
  GSPN_INLINE A* taps(int64_t d) const { return skip() + states * L + d * 3 * states; }
};

template <class A>
void pack_block(const PropagateCall& call, const PropagatePlan& plan, int64_t block) {
  constexpr int L = kLanes<A>;
  const Packed<A> packed(plan.packed, plan.packed_size, block, call, plan.shared);
  const int64_t S = call.states, per_group = call.channels / call.groups;
  const A* tap_proj = static_cast<const A*>(call.tap_proj);
  const A* gates[2] = {static_cast<const A*>(call.lam_proj), static_cast<const A*>(call.u_proj)};
  const A* skip = static_cast<const A*>(call.skip_proj);
  const A scale = static_cast<A>(-kLog2E);
  const int64_t first = block * L, count = least_of(L, call.channels - first);
  for (int64_t d = 0; d < call.directions; ++d) {
    A* out = packed.direction(d);
    for (int64_t s = 0; s < S; ++s, out += packed.outputs * L) {
      for (int64_t c = 0; c < L; ++c) {
        const bool in = c < count;
        const int64_t channel = first + c;
        if (!plan.shared) {
          for (int64_t k = 0; k < 3; ++k) {
            out[k * L + c] = in ? scale * tap_proj[((d * call.groups + channel / per_group) * 3 + k) * S + s] : A(0);
          }
        }
        for (int64_t o = 0; o < 2; ++o) {
          out[(packed.outputs - 2 + o) * L + c] = in ? gates[o][(d * call.channels + channel) * S + s] : A(0);
        }
      }
    }
    if (plan.shared) {
      const A* from = tap_proj + (d * call.groups + first / per_group) * 3 * S;
      for (int64_t i = 0; i < 3 * S; ++i) packed.taps(d)[i] = scale * from[i];
    }
  }
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t c = 0; c < L; ++c) packed.skip()[s * L + c] = skip && c < count ? skip[(first + c) * S + s] : A(0);
  }
}

// One direction over one picture.
struct Walk {
  bool columns, reverse;
  int64_t lines, cross, segment;
  Walk(const PropagateCall& call, int32_t towards)
      : columns(towards == kRight || towards == kLeft),
        reverse(towards == kUp || towards == kLeft),
        lines(columns ? call.width : call.height),
        cross(columns ? call.height : call.width),
        segment(call.segment < lines ? call.segment : lines) {}
  GSPN_INLINE int64_t line(int64_t step) const { return reverse ? lines - 1 - step : step; }
  // The rectangle of the lines from step `first` to before `last`.
  Rectangle rectangle(int64_t first, int64_t last) const {
    const int64_t low = reverse ? lines - last : first, count = last - first;
    return columns ? Rectangle{0, cross, low, count} : Rectangle{low, count, 0, cross};
  }
};

// A tile as lines: line l of the picture begins at data + (l - low) * line.
template <class A>
struct Staged {
  A* data;
  int64_t low, line, cross;
  Staged(const Tile<A>& tile, bool columns)
      : data(tile.data),
        low(columns ? tile.at.column : tile.at.row),
        line(columns ? tile.column : tile.row),
        cross(columns ? tile.row : tile.column) {}
  GSPN_INLINE A* at(int64_t l) const { return data + (l - low) * line; }
};

// The proxy of one batch entry as lines.
template <class A>
struct ProxyLines {
  const A* data;
  int64_t line, cross;
  ProxyLines(const PropagateCall& call, int64_t batch, bool columns)
      : data(static_cast<const A*>(call.proxy) + batch * call.height * call.proxy_row),
        line(columns ? call.states : call.proxy_row),
        cross(columns ? call.proxy_row : call.states) {}
  GSPN_INLINE const A* at(int64_t l) const { return data + l * line; }
};

template <class A>
GSPN_INLINE typename VectorOf<A>::index lanes_where(bool yes) {
  using I = typename VectorOf<A>::index;
  return yes ? ~I{} : I{};
}

// Keeps a product from being fused with the sum it goes into, so that directions added up as they are computed and
// directions computed apart give the same bits.
template <class V>
GSPN_INLINE V rounded(V v) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// --- Outputs of the projections ----------------------------------------------------------------------------------------

// acc[o][q] = sum_s weights[s][from + o] proxy[q][s], for O of `outputs` packed outputs and P pixels. S = 0: any number.
template <class A, int S, int O, int P>
GSPN_INLINE void project(const A* weights, int outputs, int from, const A* proxy, int64_t p_cross, int64_t states,
                         typename VectorOf<A>::type (&acc)[O][P]) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const int64_t count = S ? S : states;
  auto add = [&](int64_t s, bool first) __attribute__((always_inline)) {
    const A* w = weights + (s * outputs + from) * L;
    V value[P];
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) value[q] = V{} + proxy[q * p_cross + s];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const V weight = load(w + o * L);
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) acc[o][q] = first ? weight * value[q] : acc[o][q] + weight * value[q];
    }
  };
  add(0, true);
  if constexpr (S) {
#pragma GCC unroll 16
    for (int64_t s = 1; s < count; ++s) add(s, false);
  } else {
    for (int64_t s = 1; s < count; ++s) add(s, false);
  }
}

// --- Taps of a line that all channels of the block share -----------------------------------------------------------------

// L values of each state side by side: states[s][i] is state `from + s` of position p + i. Positions beyond the line
// repeat the last one.
template <class A>
GSPN_INLINE void turn_states(const A* proxy, int64_t p_cross, int64_t p, int64_t cross, int64_t from, int64_t count,
                             typename VectorOf<A>::type* states) {
  constexpr int L = kLanes<A>;
  if (count <= 4) {
    for (int64_t s = 0; s < count; ++s) {
      A lanes[L];
      for (int i = 0; i < L; ++i) lanes[i] = proxy[least_of(p + i, cross - 1) * p_cross + from + s];
      states[s] = load(lanes);
    }
  } else {
    for (int i = 0; i < L; ++i) states[i] = load(proxy + least_of(p + i, cross - 1) * p_cross + from);
    transpose<A>(states);
  }
}

// t_k of L positions from p on.
template <class A, int S>
GSPN_INLINE void logits_of(const A* proxy, int64_t p_cross, int64_t p, int64_t cross, int64_t states, const A* weights,
                           typename VectorOf<A>::type* t) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const int64_t count = S ? S : states;
  t[0] = t[1] = t[2] = V{};
  for (int64_t from = 0; from < count; from += L) {
    V turned[L];
    const int64_t some = least_of(L, count - from);
    turn_states(proxy, p_cross, p, cross, from, some, turned);
    for (int64_t s = 0; s < some; ++s) {
      for (int k = 0; k < 3; ++k) t[k] += turned[s] * weights[k * count + from + s];
    }
  }
}

// Lanes of L positions from p on that have the neighbour at cross offset -1 or +1.
template <class A>
GSPN_INLINE void neighbours_of(int64_t p, int64_t cross, typename VectorOf<A>::index* before,
                               typename VectorOf<A>::index* after) {
  *before = lanes_where<A>(true);
  *after = lanes_where<A>(true);
  if (p == 0) (*before)[0] = 0;
  const int64_t last = cross - 1 - p;
  if (last < kLanes<A>) (*after)[last] = 0;
}

// The weights of L positions, products of at most moderate size, and their sum.
template <class A>
GSPN_INLINE Weights<A> shared_weights(typename VectorOf<A>::type* t, int64_t p, int64_t cross) {
  using V = typename VectorOf<A>::type;
  typename VectorOf<A>::index before, after;
  neighbours_of<A>(p, cross, &before, &after);
  Weights<A> weights(t);
  if (any_beyond<A>(weights.product, TapRange<A>::overflow)) {
    settle<A>(t, before, after);
    weights = Weights<A>(t);
  }
  weights.w[0] = before ? weights.w[0] : V{};
  weights.w[2] = after ? weights.w[2] : V{};
  return weights;
}

// taps[k][position], `pitch` positions a tap.
template <class A, int S>
void shared_taps(const A* proxy, int64_t p_cross, int64_t cross, int64_t states, const A* weights, A* taps,
                 int64_t pitch) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  for (int64_t p = 0; p < cross; p += L) {
    V t[3];
    logits_of<A, S>(proxy, p_cross, p, cross, states, weights, t);
    const Weights<A> found = shared_weights<A>(t, p, cross);
    const V inverse = A(1) / found.sum();
    for (int k = 0; k < 3; ++k) store(taps + k * pitch + p, found.w[k] * inverse);
  }
}

// lane l: the sum of the lanes of rows[l], for as many rows as a vector has lanes. Squares are folded onto each other,
// from half a vector down to single lanes. Destroys rows.
template <class A, int s = kLanes<A> / 2>
GSPN_INLINE typename VectorOf<A>::type sums_of_rows(typename VectorOf<A>::type* rows) {
  using V = typename VectorOf<A>::type;
  using I = typename VectorOf<A>::index;
  using Index = typename VectorOf<A>::index_element;
  static constexpr SwapLanes<Index, kLanes<A>, s> lanes;
#pragma GCC unroll 8
  for (int i = 0; i < s; ++i) {
    const V a = rows[i], b = rows[i + s];
#if defined(__clang__)
    V x, y;
    for (int l = 0; l < kLanes<A>; ++l) {
      x[l] = (l & s) ? b[l ^ s] : a[l];
      y[l] = (l & s) ? b[l] : a[l ^ s];
    }
    rows[i] = x + y;
#else
    rows[i] = __builtin_shuffle(a, b, bit_cast<I>(lanes.low)) + __builtin_shuffle(a, b, bit_cast<I>(lanes.high));
#endif
  }
  if constexpr (s > 1) {
    return sums_of_rows<A, s / 2>(rows);
  } else {
    return rows[0];
  }
}

template <int n>
struct Number {
  static constexpr int value = n;
};

// The common numbers of states as constants; 0 for any other.
template <class Run>
void by_states(int64_t states, Run run) {
  switch (states) {
    case 2:
      return run(Number<2>{});
    case 4:
      return run(Number<4>{});
    case 8:
      return run(Number<8>{});
    case 16:
      return run(Number<16>{});
    default:
      return run(Number<0>{});
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
