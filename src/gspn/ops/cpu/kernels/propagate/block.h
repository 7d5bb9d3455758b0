// A block of channels, for the forward and the backward: the packed projections, the walk over lines, the
// projection of the proxy, the taps of a line that all channels share.
//
// Twelve tap maps, four lam, four u and a skip are functions of a proxy of a few channels. A block of as many channels
// as a vector has lanes is walked four times; at every pixel the maps are projected from the proxy into registers, used
// and forgotten. Arithmetic decides the speed, so a few pixels share the load of each projection vector, three sigmoids
// share one division (taps.h), and all layouts are transposed to [pixel][lane] on their way into scratch.
#pragma once

#include "../common/scratch.h"
#include "channel_blocks.h"
#include "taps.h"

namespace gspn::GSPN_ISA {
namespace {

// Pixels computed together, so that a projection's vector is loaded once for all of them.
constexpr int kPixels = GSPN_VECTOR_BYTES == 64 ? 4 : 2;

// The packed projections of a block, or their gradients. Channels beyond the last have zeros.
//
//   [lane]                                    the scale alone, not of gradients
//   [direction][proxy channel][output][lane]  outputs tap 0, 1, 2 (scaled), lam, u; lam, u alone if shared
//   [proxy channel][lane]                     the skip
//   [direction][tap][proxy channel]           the scaled taps, if shared; of gradients a vector of partial sums for
//   each
template <class A>
struct Packed {
  static constexpr int L = kLanes<A>;
  A* base;
  int64_t directions, proxy_channels, outputs, tap_size;

  Packed(const PropagateCall& call, const PropagatePlan& plan, int64_t block)
      : Packed(call, plan, static_cast<A*>(plan.packed) + block * plan.packed_size + L, 1) {}
  static Packed gradients(const PropagateCall& call, const PropagatePlan& plan, int64_t batch, int64_t block) {
    return {call, plan, static_cast<A*>(plan.weight_parts) + (batch * plan.blocks + block) * plan.weight_size, L};
  }
  // The factor in the taps: -log2(e), or 1 where that would overflow. Not of gradients.
  GSPN_INLINE A& scale() const { return base[-L]; }
  // The factor from the projected logits to t: exactly 1, or -log2(e).
  GSPN_INLINE A to_t() const { return static_cast<A>(-kLog2E) / scale(); }
  GSPN_INLINE int64_t direction_size() const { return proxy_channels * outputs * L; }
  GSPN_INLINE A* direction(int64_t d) const { return base + d * direction_size(); }
  GSPN_INLINE A* skip() const { return direction(directions); }
  GSPN_INLINE A* taps(int64_t d) const { return skip() + proxy_channels * L + d * 3 * proxy_channels * tap_size; }

 private:
  Packed(const PropagateCall& call, const PropagatePlan& plan, A* base, int64_t tap_size)
      : base(base),
        directions(call.direction_count),
        proxy_channels(call.proxy_channels),
        outputs(plan.shared ? 2 : 5),
        tap_size(tap_size) {}
};

// One direction over one image.
struct Walk {
  bool columns, reverse;
  int64_t lines, cross, segment;
  Walk(const PropagateCall& call, int64_t d)
      : columns(call.directions[d] == kRight || call.directions[d] == kLeft),
        reverse(call.directions[d] == kUp || call.directions[d] == kLeft),
        lines(columns ? call.width : call.height),
        cross(columns ? call.height : call.width),
        segment(call.segment) {}
  GSPN_INLINE int64_t line(int64_t step) const { return reverse ? lines - 1 - step : step; }
  GSPN_INLINE bool starts_segment(int64_t step) const { return step % segment == 0; }
  // The rectangle of the lines from step `first` to before `last`.
  Rectangle rectangle(int64_t first, int64_t last) const {
    const int64_t low = reverse ? lines - last : first, count = last - first;
    return columns ? Rectangle{0, cross, low, count} : Rectangle{low, count, 0, cross};
  }
};

// A tile as lines: line l of the image begins at data + (l - low) * line.
template <class A>
struct TileLines {
  A* data;
  int64_t low, line, cross;
  TileLines(const Tile<A>& tile, bool columns)
      : data(tile.data),
        low(columns ? tile.at.column : tile.at.row),
        line(columns ? tile.column : tile.row),
        cross(columns ? tile.row : tile.column) {}
  GSPN_INLINE A* at(int64_t l) const { return data + (l - low) * line; }
};

// The proxy along a line: proxy channel s of position p at data[p * cross + s].
template <class A>
struct ProxyLine {
  const A* data;
  int64_t cross, channels;
  GSPN_INLINE ProxyLine at(int64_t p) const { return {data + p * cross, cross, channels}; }
};

// The proxy of one batch entry as lines.
template <class A>
struct ProxyLines {
  const A* data;
  int64_t line, cross, channels;
  ProxyLines(const PropagateCall& call, int64_t batch, bool columns)
      : data(static_cast<const A*>(call.proxy) + batch * call.proxy_image),
        line(columns ? call.proxy_channels : call.proxy_row),
        cross(columns ? call.proxy_row : call.proxy_channels),
        channels(call.proxy_channels) {}
  GSPN_INLINE ProxyLine<A> at(int64_t l) const { return {data + l * line, cross, channels}; }
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

// --- Outputs of the projections ---

template <int n>
struct Number {
  static constexpr int value = n;
};

GSPN_INLINE bool is_common(int64_t proxy_channels) {
  return proxy_channels == 2 || proxy_channels == 4 || proxy_channels == 8 || proxy_channels == 16;
}

// x86 processors without AVX2 are too old to be worth the time that more kernels take to compile.
#if defined(__x86_64__) && !defined(__AVX2__)
constexpr bool kConstantProxyChannels = false;
#else
constexpr bool kConstantProxyChannels = true;
#endif

// Calls run with the number of proxy channels as a constant where it is a common one and the state is float; 0 stands
// for any number.
template <class A, class Run>
void dispatch_on_proxy_channels(int64_t proxy_channels, Run run) {
  if constexpr (sizeof(A) == 4 && kConstantProxyChannels) {
    switch (proxy_channels) {
      case 2: return run(Number<2>{});
      case 4: return run(Number<4>{});
      case 8: return run(Number<8>{});
      case 16: return run(Number<16>{});
    }
  }
  run(Number<0>{});
}

// acc[o][q] = sum_s weights[s][from + o] proxy[q][s], for O of `outputs` packed outputs, P pixels and S proxy channels.
template <class A, int S, int O, int P>
GSPN_INLINE void project(const A* weights, int outputs, int from, const ProxyLine<A>& proxy,
                         typename VectorOf<A>::type (&acc)[O][P]) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const A* pixels[P];
#pragma GCC unroll 8
  for (int q = 0; q < P; ++q) {
    pixels[q] = proxy.at(q).data;
    asm("" : "+r"(pixels[q]));  // one address a pixel, and not one a value
  }
  auto add = [&](int64_t s, bool first) __attribute__((always_inline)) {
    const A* w = weights + (s * outputs + from) * L;
    V value[P];
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) value[q] = pixels[q][s] - V{};  // x + 0 would be an addition
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const V weight = in_register(load(w + o * L));
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) acc[o][q] = first ? weight * value[q] : acc[o][q] + weight * value[q];
    }
  };
  if constexpr (S) {
    add(0, true);
#pragma GCC unroll 16
    for (int64_t s = 1; s < S; ++s) add(s, false);
  } else {
    // Of an unrolled sum the compiler fuses the first product into the second. Where the number is a common one,
    // beginning with the second here gives the same bits.
    const int64_t begin = is_common(proxy.channels) ? 1 : 0;
    add(begin, true);
    for (int64_t s = 1; s < proxy.channels; ++s) add(s == begin ? 0 : s, false);
  }
  // Computed here, and not sunk below a branch with all that was loaded for it.
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) acc[o][q] = in_register(acc[o][q]);
  }
}

// out = skip x, or zero where there is no skip, for a tile.
template <class A>
void start_with_skip(const PropagateCall& call, const Packed<A>& packed, int64_t batch, const Tile<A>& x,
                     const Tile<A>& out) {
  using V = typename VectorOf<A>::type;
  const Rectangle& at = out.at;
  if (!call.skip_proj) {
    for (int64_t i = 0; i < at.rows; ++i) {
      A* to = out.pixel(at.row + i, at.column);
      for (int64_t p = 0; p < at.columns; ++p) store(to + p * out.column, V{});
    }
    return;
  }
  const ProxyLines<A> proxies(call, batch, false);
  dispatch_on_proxy_channels<A>(call.proxy_channels, [&](auto proxy_channels) {
    for (int64_t i = 0; i < at.rows; ++i) {
      const ProxyLine<A> proxy = proxies.at(at.row + i).at(at.column);
      const A* from = x.pixel(at.row + i, at.column);
      A* to = out.pixel(at.row + i, at.column);
      const auto some = [&](auto number, int64_t p) __attribute__((always_inline)) {
        constexpr int S = decltype(proxy_channels)::value, P = decltype(number)::value;
        V skip[1][P];
        project<A, S, 1, P>(packed.skip(), 1, 0, proxy.at(p), skip);
        for (int q = 0; q < P; ++q) {
          store(to + (p + q) * out.column, rounded(skip[0][q] * load(from + (p + q) * x.column)));
        }
      };
      int64_t p = 0;
      for (; p + kPixels <= at.columns; p += kPixels) some(Number<kPixels>{}, p);
      for (; p < at.columns; ++p) some(Number<1>{}, p);
    }
  });
}

// --- Taps of a line that all channels of the block share ---

// L values of each proxy channel side by side: out[s][i] is channel `from + s` of position p + i. Positions beyond the
// `cross` of the line repeat the last one.
template <class A>
GSPN_INLINE void transpose_proxy(const ProxyLine<A>& proxy, int64_t p, int64_t cross, int64_t from, int64_t count,
                                 typename VectorOf<A>::type* out) {
  constexpr int L = kLanes<A>;
  const auto position = [&](int i) { return proxy.data + minimum(p + i, cross - 1) * proxy.cross + from; };
  if (count <= 4) {
    for (int64_t s = 0; s < count; ++s) {
      A lanes[L];
      for (int i = 0; i < L; ++i) lanes[i] = position(i)[s];
      out[s] = load(lanes);
    }
  } else {
    for (int i = 0; i < L; ++i) out[i] = load(position(i));
    transpose<A>(out);
  }
}

// t_k of L positions from p on.
template <class A, int S>
GSPN_INLINE void shared_logits(const ProxyLine<A>& proxy, int64_t p, int64_t cross, const A* weights, A to_t,
                               typename VectorOf<A>::type* t) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const int64_t count = S ? S : proxy.channels;
  t[0] = t[1] = t[2] = V{};
  for (int64_t from = 0; from < count; from += L) {
    V channels[L];
    const int64_t some = minimum(L, count - from);
    transpose_proxy(proxy, p, cross, from, some, channels);
    for (int64_t s = 0; s < some; ++s) {
      for (int k = 0; k < 3; ++k) t[k] += channels[s] * weights[k * count + from + s];
    }
  }
  for (int k = 0; k < 3; ++k) t[k] *= to_t;
}

// The taps of L positions from p on of `cross`, with kSlopes the slopes too.
template <class A, bool kSlopes>
GSPN_INLINE TapsAndSlopes<A> shared_taps_at(const typename VectorOf<A>::type* t, int64_t p, int64_t cross) {
  using V = typename VectorOf<A>::type;
  // Lanes that have the neighbour at cross offset -1 or +1.
  auto before = lanes_where<A>(true), after = lanes_where<A>(true);
  if (p == 0) before[0] = 0;
  const int64_t last = cross - 1 - p;
  if (last < kLanes<A>) after[last] = 0;
  const Weights<A> weights(t);
  TapsAndSlopes<A> out;
  if (__builtin_expect(out_of_range<A>(weights.product, weights.reach), 0)) {
    const TapsAndSlopes<A> safe = safe_taps<A>(t, before, after);
    for (int k = 0; k < 3; ++k) out.w[k] = safe.w[k], out.slope[k] = safe.slope[k];
    return out;
  }
  out.w[0] = before ? weights.w[0] : V{}, out.w[1] = weights.w[1], out.w[2] = after ? weights.w[2] : V{};
  const V inverse = A(1) / (out.w[0] + out.w[1] + out.w[2]);
  for (int k = 0; k < 3; ++k) {
    out.w[k] *= inverse;
    if constexpr (kSlopes) out.slope[k] = weights.e[k] / (weights.e[k] + A(1));
  }
  return out;
}

// taps[k][position], `pitch` positions a tap.
template <class A, int S>
void shared_taps(const ProxyLine<A>& proxy, int64_t cross, const A* weights, A to_t, A* taps, int64_t pitch) {
  for (int64_t p = 0; p < cross; p += kLanes<A>) {
    typename VectorOf<A>::type t[3];
    shared_logits<A, S>(proxy, p, cross, weights, to_t, t);
    const TapsAndSlopes<A> shared = shared_taps_at<A, false>(t, p, cross);
    for (int k = 0; k < 3; ++k) store(taps + k * pitch + p, shared.w[k]);
  }
}

}  // namespace
}  // namespace gspn::GSPN_ISA
