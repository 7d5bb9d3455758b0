// The recurrence along one line, its maps in registers alone: h = lam x + sum_k w_k h_{i-1}[j+k-1] and y += u h.
//
// Counted for S proxy channels, a vector and direction: 5 S multiply-adds for the maps, 3 exponentials of 8
// instructions (11 without AVX-512), 12 for the taps and a division, 6 for the state and the gates. With shared taps 2
// S and 6, and a sixteenth of the rest.
#pragma once

#include "block.h"

namespace gspn::GSPN_ISA {
namespace {

// How far ahead: long enough for memory to answer, and few enough that pixels down a column of an image whose rows are
// a power of two apart, which all compete for one set of each cache, do not evict each other before they are used.
constexpr int64_t kPixelsAhead = 8;

template <class A>
struct ForwardLine {
  int64_t cross;
  const A* x;
  A* y;
  int64_t x_cross, y_cross;
  ProxyLine<A> proxy;
  const A* weights;
  A to_t;         // what turns projected logits into t: 1, see Packed::scale
  const A* taps;  // shared: [3][tap_pitch]
  int64_t tap_pitch;
  bool fetch;
  const A* prev;  // [cross][lane] with a zero position on either side; not used on a segment's first line
  A* state;       // the same, written
  A* powers;      // without the gate: [cross][tap][lane] e_k as in taps.h, where they are to be kept; or null
};

// P pixels from p on; without kGate the states alone. False, with nothing written, if their logits or the states before
// them need the safe way.
template <class A, int S, int P, bool kShared, bool kPrev, bool kGate, bool kSafe>
GSPN_INLINE bool forward_pixels(const ForwardLine<A>& line, int64_t p) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>, outputs = kShared ? 2 : 5, from = !kShared && !kPrev ? 3 : 0;
  constexpr int O = outputs - from - (kGate ? 0 : 1), lam = outputs - from - 2;
  V acc[O][P];
  const ProxyLine<A> proxy = line.proxy.at(p);
  if (line.fetch) {
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      __builtin_prefetch(proxy.at(q + kPixelsAhead).data);
      __builtin_prefetch(line.x + (p + q + kPixelsAhead) * line.x_cross);
      if constexpr (kGate) __builtin_prefetch(line.y + (p + q + kPixelsAhead) * line.y_cross);
    }
  }
  project<A, S, O, P>(line.weights, outputs, from, proxy, acc);
  V h[P];
  if constexpr (kPrev && kShared) {
    const A* prev = line.prev + p * L;
    const A* taps = line.taps + p;
    const int64_t pitch = line.tap_pitch;
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      h[q] = load(prev + (q - 1) * L) * taps[q] + load(prev + q * L) * taps[pitch + q] +
             load(prev + (q + 1) * L) * taps[2 * pitch + q];
    }
  } else if constexpr (kPrev) {
    V sum[P], w[3][P], worst, reach;
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      const bool first = p + q == 0, last = p + q == line.cross - 1;
      if constexpr (kSafe) {
        const V t[3] = {acc[0][q] * line.to_t, acc[1][q] * line.to_t, acc[2][q] * line.to_t};
        const TapsAndSlopes<A> taps = safe_taps<A>(t, lanes_where<A>(!first), lanes_where<A>(!last));
        for (int k = 0; k < 3; ++k) w[k][q] = taps.w[k];
      } else {
        const V t[3] = {acc[0][q], acc[1][q], acc[2][q]};
        const Weights<A> weights(t);
        for (int k = 0; k < 3; ++k) w[k][q] = weights.w[k];
        if (__builtin_expect(first, 0)) w[0][q] = V{};
        if (__builtin_expect(last, 0)) w[2][q] = V{};
        sum[q] = w[0][q] + w[1][q] + w[2][q];
        const V largest = kGate ? sum[q] : weights.product;
        worst = q ? worst + largest : largest;
        reach = q ? greater_of<A>(weights.reach, reach) : weights.reach;
        if (!kGate && line.powers) {
#pragma GCC unroll 3
          for (int k = 0; k < 3; ++k) store(line.powers + (3 * (p + q) + k) * L, weights.e[k]);
        }
      }
    }
    const A* prev = line.prev + p * L;
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      const V mix =
          w[0][q] * load(prev + (q - 1) * L) + w[1][q] * load(prev + q * L) + w[2][q] * load(prev + (q + 1) * L);
      if constexpr (kSafe) {
        h[q] = mix;
      } else {
        worst += mix * A(0);  // NaN for an infinite or NaN product
        h[q] = mix / sum[q];
      }
    }
    if constexpr (!kSafe) {
      if (__builtin_expect(out_of_range<A>(worst, reach), 0)) return false;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < P; ++q) {
    const V input = acc[lam][q] * load(line.x + (p + q) * line.x_cross);
    h[q] = kPrev ? h[q] + input : input;
    store(line.state + (p + q) * L, h[q]);
    if constexpr (kGate) {
      A* y = line.y + (p + q) * line.y_cross;
      store(y, load(y) + rounded(acc[lam + 1][q] * h[q]));
    }
  }
  return true;
}

template <class A, bool kGate>
__attribute__((noinline)) void forward_pixels_safely(const ForwardLine<A>& line, int64_t p, int64_t count) {
  for (int64_t q = 0; q < count; ++q) forward_pixels<A, 0, 1, false, true, kGate, true>(line, p + q);
}

// False if any pixel went the safe way.
template <class A, int S, bool kShared, bool kPrev, bool kGate>
bool forward_line(const ForwardLine<A>& line) {
  constexpr bool kTaps = kPrev && !kShared;
  if (kTaps && line.to_t != A(1)) {
    forward_pixels_safely<A, kGate>(line, 0, line.cross);
    return false;
  }
  bool all_done = true;
  const ForwardLine<A> copy = line;  // whose members no store can change: they are read once
  const auto some = [&](auto number, int64_t p) __attribute__((always_inline)) {
    constexpr int P = decltype(number)::value;
    const bool done = forward_pixels<A, S, P, kShared, kPrev, kGate, false>(copy, p);
    if constexpr (kTaps) {
      if (!done) forward_pixels_safely<A, kGate>(line, p, P);
      all_done &= done;
    }
  };
  int64_t p = 0;
  for (; p + kPixels <= line.cross; p += kPixels) some(Number<kPixels>{}, p);
  for (; p < line.cross; ++p) some(Number<1>{}, p);
  return all_done;
}

}  // namespace
}  // namespace gspn::GSPN_ISA
