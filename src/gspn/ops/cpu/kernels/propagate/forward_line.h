// The recurrence along one line, its maps in registers alone: h = lam x + sum_k w_k h_{i-1}[j+k-1] and y += u h.
//
// Counted for S proxy channels, a vector and direction: 5 S multiply-adds for the maps, 3 exponentials of 8
// instructions, 12 for the taps and a division, 6 for the state and the gates. With shared taps 2 S and 6, and a
// sixteenth of the rest.
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
  const A* taps;  // shared: [3][tap_pitch]
  int64_t tap_pitch;
  bool fetch;
  const A* prev;  // [cross][lane] with a zero position on either side; not used on a segment's first line
  A* state;       // the same, written
};

// P pixels from p on; without kGate the states alone. False, with nothing written, if their logits need the safe way.
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
    V sum[P], w[3][P], worst{};
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      const bool first = p + q == 0, last = p + q == line.cross - 1;
      V t[3] = {acc[0][q], acc[1][q], acc[2][q]};
      if constexpr (kSafe) shift_into_range<A>(t, lanes_where<A>(!first), lanes_where<A>(!last));
      const Weights<A> weights(t);
      for (int k = 0; k < 3; ++k) w[k][q] = weights.w[k];
      if (__builtin_expect(first, 0)) w[0][q] = V{};
      if (__builtin_expect(last, 0)) w[2][q] = V{};
      sum[q] = w[0][q] + w[1][q] + w[2][q];
      worst += sum[q];
    }
    if constexpr (!kSafe) {
      if (__builtin_expect(any_beyond<A>(worst, TapRange<A>::overflow), 0)) return false;
    }
    const A* prev = line.prev + p * L;
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      const V mix =
          w[0][q] * load(prev + (q - 1) * L) + w[1][q] * load(prev + q * L) + w[2][q] * load(prev + (q + 1) * L);
      h[q] = mix / sum[q];
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

template <class A, int S, bool kGate>
__attribute__((noinline)) void forward_pixels_safely(const ForwardLine<A>& line, int64_t p, int count) {
  for (int q = 0; q < count; ++q) forward_pixels<A, S, 1, false, true, kGate, true>(line, p + q);
}

template <class A, int S, bool kShared, bool kPrev, bool kGate>
void forward_line(const ForwardLine<A>& line) {
  const auto some = [&](auto number, int64_t p) __attribute__((always_inline)) {
    constexpr int P = decltype(number)::value;
    const bool done = forward_pixels<A, S, P, kShared, kPrev, kGate, false>(line, p);
    if constexpr (kPrev && !kShared) {
      if (!done) forward_pixels_safely<A, S, kGate>(line, p, P);
    }
  };
  int64_t p = 0;
  for (; p + kPixels <= line.cross; p += kPixels) some(Number<kPixels>{}, p);
  for (; p < line.cross; ++p) some(Number<1>{}, p);
}

}  // namespace
}  // namespace gspn::GSPN_ISA
