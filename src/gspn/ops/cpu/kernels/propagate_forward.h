// The forward of one block of channels: lines are walked, maps exist in registers alone.
//
// Counted for S states, a vector and direction: 5 S multiply-adds for the maps, 3 exponentials of 8 instructions, 12 for
// the taps and a division, 6 for the state and the gates. With shared taps 2 S and 6, and a sixteenth of the rest.
#pragma once

#include "propagate_block.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

// How far ahead: long enough for memory to answer, and few enough that pixels down a column of a picture whose rows are a
// power of two apart, which all compete for one set of each cache, do not evict each other before they are used.
constexpr int64_t kPixelsAhead = 8;

template <class A>
struct ForwardLine {
  int64_t cross, states;
  const A* x;
  A* y;
  int64_t x_cross, y_cross;
  const A* proxy;
  int64_t p_cross;
  const A* weights;
  const A* taps;  // shared: [3][tap_pitch]
  int64_t tap_pitch;
  bool fetch;
  const A* prev;  // [cross][lane] with a zero position on either side; null on a segment's first line
  A* state;       // the same, written
};

// P pixels from p on; without kGate the states alone. False, with nothing written, if their logits need the safe way.
template <class A, int S, int P, bool kShared, bool kPrev, bool kGate, bool kSafe>
GSPN_INLINE bool forward_pixels(const ForwardLine<A>& line, int64_t p) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>, outputs = kShared ? 2 : 5, from = !kShared && !kPrev ? 3 : 0;
  constexpr int O = outputs - from - (kGate ? 0 : 1), lam = outputs - from - 2;
  V acc[O][P];
  const A* proxy = line.proxy + p * line.p_cross;
  if (line.fetch) {
#pragma GCC unroll 8
    for (int q = 0; q < P; ++q) {
      __builtin_prefetch(proxy + (q + kPixelsAhead) * line.p_cross);
      __builtin_prefetch(line.x + (p + q + kPixelsAhead) * line.x_cross);
      if constexpr (kGate) __builtin_prefetch(line.y + (p + q + kPixelsAhead) * line.y_cross);
    }
  }
  project<A, S, O, P>(line.weights, outputs, from, proxy, line.p_cross, line.states, acc);
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
      if constexpr (kSafe) settle<A>(t, lanes_where<A>(!first), lanes_where<A>(!last));
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
      const V mix = w[0][q] * load(prev + (q - 1) * L) + w[1][q] * load(prev + q * L) + w[2][q] * load(prev + (q + 1) * L);
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

template <class A, int S, int P, bool kShared, bool kPrev, bool kGate>
__attribute__((noinline)) void forward_pixels_safely(const ForwardLine<A>& line, int64_t p) {
  for (int q = 0; q < P; ++q) forward_pixels<A, S, 1, kShared, kPrev, kGate, true>(line, p + q);
}

template <class A, int S, bool kShared, bool kPrev, bool kGate>
void forward_line(const ForwardLine<A>& line) {
  int64_t p = 0;
  for (; p + kPixels <= line.cross; p += kPixels) {
    if (!forward_pixels<A, S, kPixels, kShared, kPrev, kGate, false>(line, p)) {
      forward_pixels_safely<A, S, kPixels, kShared, kPrev, kGate>(line, p);
    }
  }
  for (; p < line.cross; ++p) {
    if (!forward_pixels<A, S, 1, kShared, kPrev, kGate, false>(line, p)) {
      forward_pixels_safely<A, S, 1, kShared, kPrev, kGate>(line, p);
    }
  }
}

// Two lines of states, [cross][lane] with a zero position on either side, and the line of shared taps.
template <class A>
struct StateLines {
  A *before, *now, *taps;
  static int64_t size(int64_t cross) { return 2 * (cross + 2) * kLanes<A> + 4 * (cross + kLanes<A>); }
  StateLines(A* memory, int64_t cross) {
    constexpr int L = kLanes<A>;
    memset(memory, 0, static_cast<size_t>(2 * (cross + 2) * L) * sizeof(A));
    before = memory + L;
    now = before + (cross + 2) * L;
    taps = memory + 2 * (cross + 2) * L;
  }
  GSPN_INLINE void turn() {
    A* const old = before;
    before = now;
    now = old;
  }
};

// Steps [first, last) of direction d over staged lines; the state goes on from what `states` holds.
template <class A, int S, bool kShared>
void forward_steps(const PropagateCall& call, const Packed<A>& packed, const Walk& walk, int64_t d, int64_t batch,
                   const Staged<A>& x, const Staged<A>& y, StateLines<A>& states, int64_t first, int64_t last, bool fetch) {
  const ProxyLines<A> proxy(call, batch, walk.columns);
  ForwardLine<A> line;
  line.cross = walk.cross, line.states = call.states;
  line.x_cross = x.cross, line.y_cross = y.cross, line.p_cross = proxy.cross;
  line.weights = packed.direction(d);
  line.taps = states.taps, line.tap_pitch = walk.cross + kLanes<A>;
  line.fetch = fetch;
  for (int64_t step = first; step < last; ++step) {
    const int64_t l = walk.line(step);
    line.x = x.at(l), line.y = y.at(l), line.proxy = proxy.at(l);
    line.prev = states.before, line.state = states.now;
    if (step % walk.segment == 0) {
      forward_line<A, S, kShared, false, true>(line);
    } else {
      if constexpr (kShared) {
        shared_taps<A, S>(line.proxy, line.p_cross, line.cross, line.states, packed.taps(d), states.taps,
                          line.tap_pitch);
      }
      forward_line<A, S, kShared, true, true>(line);
    }
    states.turn();
  }
}

// out = skip x, or zero where there is none, for a staged rectangle.
template <class A>
void start_with_skip(const PropagateCall& call, const Packed<A>& packed, int64_t batch, const Tile<A>& x, const Tile<A>& out) {
  using V = typename VectorOf<A>::type;
  const Rectangle& at = out.at;
  if (!call.skip_proj) {
    for (int64_t i = 0; i < at.rows; ++i) {
      for (int64_t j = 0; j < at.columns; ++j) store(out.data + i * out.row + j * out.column, V{});
    }
    return;
  }
  const ProxyLines<A> proxy(call, batch, false);
  by_states(call.states, [&](auto states) {
    constexpr int S = decltype(states)::value;
    for (int64_t i = 0; i < at.rows; ++i) {
      const A* line = proxy.at(at.row + i) + at.column * proxy.cross;
      const A* from = x.pixel(at.row + i, at.column);
      A* to = out.pixel(at.row + i, at.column);
      int64_t p = 0;
      for (; p + kPixels <= at.columns; p += kPixels) {
        V acc[1][kPixels];
        project<A, S, 1, kPixels>(packed.skip(), 1, 0, line + p * proxy.cross, proxy.cross, call.states, acc);
        for (int q = 0; q < kPixels; ++q) {
          store(to + (p + q) * out.column, rounded(acc[0][q] * load(from + (p + q) * x.column)));
        }
      }
      for (; p < at.columns; ++p) {
        V acc[1][1];
        project<A, S, 1, 1>(packed.skip(), 1, 0, line + p * proxy.cross, proxy.cross, call.states, acc);
        store(to + p * out.column, rounded(acc[0][0] * load(from + p * x.column)));
      }
    }
  });
}

template <class A>
void scan_direction(const PropagateCall& call, const PropagatePlan& plan, const Packed<A>& packed, const Walk& walk,
                    int64_t d, int64_t batch, const Staged<A>& x, const Staged<A>& y, StateLines<A>& states,
                    int64_t first, int64_t last) {
  by_states(call.states, [&](auto number) {
    constexpr int S = decltype(number)::value;
    if (plan.shared) {
      forward_steps<A, S, true>(call, packed, walk, d, batch, x, y, states, first, last, plan.fetch);
    } else {
      forward_steps<A, S, false>(call, packed, walk, d, batch, x, y, states, first, last, plan.fetch);
    }
  });
}

// Pixels of the larger tile.
GSPN_INLINE int64_t tile_size(const PropagateCall& call, const PropagatePlan& plan) {
  const int64_t rows = plan.row_tile * call.width, columns = plan.column_tile * (call.height + 1);
  return rows > columns ? rows : columns;
}

template <class T>
void propagate_forward(const PropagateCall& call, const PropagatePlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t span = index % plan.spans;
  index /= plan.spans;
  const int64_t only = plan.apart ? index % call.directions : -1;
  if (plan.apart) index /= call.directions;
  const int64_t block = index % plan.blocks, batch = index / plan.blocks;
  const int64_t channel = block * L, count = least_of(L, call.channels - channel);
  const int64_t pixels = call.height * call.width;
  const Rectangle all{0, call.height, 0, call.width};
  const Packed<A> packed(plan.packed, plan.packed_size, block, call, plan.shared);

  Scratch scratch(memory);
  const int64_t longest = call.height > call.width ? call.height : call.width;
  A* state_memory = scratch.take<A>(StateLines<A>::size(longest));
  const int64_t tile = tile_size(call, plan) * L;
  A* x_memory = scratch.take<A>(plan.keep_x ? pixels * L : tile);
  const auto tile_of = [&](A* data, const Rectangle& at, const Walk& walk) {
    return walk.columns ? Tile<A>::by_columns(data, at) : Tile<A>::by_rows(data, at);
  };

  if (plan.apart) {
    A* part = static_cast<A*>(plan.parts) + ((only * call.batch + batch) * plan.blocks + block) * pixels * L;
    const Walk walk(call, call.towards[only]);
    const int64_t segments = (walk.lines + walk.segment - 1) / walk.segment;
    const int64_t first = segments * span / plan.spans * walk.segment;
    const int64_t last = least_of(segments * (span + 1) / plan.spans * walk.segment, walk.lines);
    const Tile<A> y = Tile<A>::by_rows(part, all);
    StateLines<A> states(state_memory, walk.cross);
    const int64_t lines = walk.columns ? plan.column_tile : plan.row_tile;
    for (int64_t step = first; step < last; step += lines) {
      const int64_t end = least_of(step + lines, last);
      const Tile<A> x = tile_of(x_memory, walk.rectangle(step, end), walk);
      read_block<T>(call.x, batch, channel, count, x);
      for (int64_t i = 0; i < x.at.rows; ++i) {
        memset(y.pixel(x.at.row + i, x.at.column), 0, static_cast<size_t>(x.at.columns * L) * sizeof(A));
      }
      scan_direction<A>(call, plan, packed, walk, only, batch, Staged<A>(x, walk.columns), Staged<A>(y, walk.columns),
                        states, step, end);
    }
    return;
  }

  if (plan.direct && count == L) {
    const auto walked = [&](const Image& image) {
      return Tile<A>{reinterpret_cast<A*>(pixel_of<T>(image, batch, channel, 0, 0)), all, image.row, image.column};
    };
    const Tile<A> x = walked(call.x), y = walked(call.y);
    for (int64_t d = 0; d < call.directions; ++d) {
      const Walk walk(call, call.towards[d]);
      StateLines<A> states(state_memory, walk.cross);
      // The first direction finds in the caches what the skip has just read and written.
      const int64_t lines = d > 0 ? walk.lines : walk.columns ? plan.column_tile : plan.row_tile;
      for (int64_t step = 0; step < walk.lines; step += lines) {
        const int64_t end = least_of(step + lines, walk.lines);
        if (d == 0) {
          const Rectangle at = walk.rectangle(step, end);
          start_with_skip<A>(call, packed, batch, x.part(at), y.part(at));
        }
        scan_direction<A>(call, plan, packed, walk, d, batch, Staged<A>(x, walk.columns), Staged<A>(y, walk.columns),
                          states, step, end);
      }
    }
    return;
  }

  // A whole block of a dense y has the size of its picture: it is gathered there, and turned by way of x's.
  const bool in_place = plan.y_in_place && count == L;
  A* y_memory = in_place ? reinterpret_cast<A*>(pixel_of<T>(call.y, batch, channel, 0, 0))
                         : scratch.take<A>(plan.keep_y ? pixels * L : tile);
  const Tile<A> kept_x = Tile<A>::by_rows(x_memory, all), kept_y = Tile<A>::by_rows(y_memory, all);
  if (plan.keep_x) read_block<T>(call.x, batch, channel, count, kept_x);
  for (int64_t d = 0; d < call.directions; ++d) {
    const Walk walk(call, call.towards[d]);
    StateLines<A> states(state_memory, walk.cross);
    const int64_t lines = plan.keep_x ? walk.lines : walk.columns ? plan.column_tile : plan.row_tile;
    for (int64_t step = 0; step < walk.lines; step += lines) {
      const int64_t end = least_of(step + lines, walk.lines);
      const Rectangle at = walk.rectangle(step, end);
      const Tile<A> x = plan.keep_x ? kept_x.part(at) : tile_of(x_memory, at, walk);
      const Tile<A> y = plan.keep_y ? kept_y.part(at) : tile_of(y_memory, at, walk);
      if (!plan.keep_x) read_block<T>(call.x, batch, channel, count, x);
      if (d == 0) {
        start_with_skip<A>(call, packed, batch, x, y);
      } else if (!plan.keep_y) {
        read_block<T>(call.y, batch, channel, count, y);
      }
      scan_direction<A>(call, plan, packed, walk, d, batch, Staged<A>(x, walk.columns), Staged<A>(y, walk.columns), states,
                        step, end);
      if (!plan.keep_y) write_block<T>(y, call.y, batch, channel, count);
    }
  }
  if (in_place) {
    memcpy(x_memory, y_memory, static_cast<size_t>(pixels * L) * sizeof(A));
    write_block<T>(kept_x, call.y, batch, channel, count);
  } else if (plan.keep_y) {
    write_block<T>(kept_y, call.y, batch, channel, count);
  }
}

// to = skip from, plus the directions that were computed apart, in their order.
template <class T>
void propagate_merge(const PropagateCall& call, const PropagatePlan& plan, const Image& from, const Image& to,
                     int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t block = index % plan.blocks, batch = index / plan.blocks;
  const int64_t channel = block * L, count = least_of(L, call.channels - channel);
  const Packed<A> packed(plan.packed, plan.packed_size, block, call, plan.shared);
  Scratch scratch(memory);
  A* in_memory = scratch.take<A>(call.width * L);
  A* out = scratch.take<A>(call.width * L);
  for (int64_t row = 0; row < call.height; ++row) {
    const Rectangle at{row, 1, 0, call.width};
    const Tile<A> in = Tile<A>::by_rows(in_memory, at), sum = Tile<A>::by_rows(out, at);
    if (call.skip_proj) read_block<T>(from, batch, channel, count, in);
    start_with_skip<A>(call, packed, batch, in, sum);
    for (int64_t d = 0; d < call.directions; ++d) {
      const A* part = static_cast<const A*>(plan.parts) +
                      (((d * call.batch + batch) * plan.blocks + block) * call.height + row) * call.width * L;
      for (int64_t i = 0; i < call.width * L; i += L) store(out + i, load(out + i) + load(part + i));
    }
    write_block<T>(sum, to, batch, channel, count);
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
