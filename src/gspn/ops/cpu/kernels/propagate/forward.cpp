// The forward of one block of channels: the skip, then the directions one after the other.
#include "forward_line.h"

namespace gspn::GSPN_ISA {
namespace {

// Pixels of the larger tile.
int64_t tile_pixels(const PropagateCall& call, const PropagatePlan& plan) {
  const int64_t rows = plan.row_tile * call.width, columns = plan.column_tile * (call.height + 1);
  return rows > columns ? rows : columns;
}

template <class A>
struct ForwardScratch {
  A* state[2];  // lines of [cross][lane] with a zero position on either side
  A* taps;      // shared: [3][cross and a vector]
  A *x, *y;     // an image or a tile; y null where it is gathered in its own memory

  ForwardScratch(Scratch& scratch, const PropagateCall& call, const PropagatePlan& plan, int64_t channels) {
    constexpr int L = kLanes<A>;
    const int64_t tile = tile_pixels(call, plan);
    for (A*& line : state) line = scratch.take<A>((call.longest() + 2) * L);
    taps = scratch.take<A>(3 * (call.longest() + L));
    x = scratch.take<A>((plan.keep_x ? call.pixels() : tile) * L);
    y = plan.y_in_place && channels % L == 0 ? nullptr : scratch.take<A>((plan.keep_y ? call.pixels() : tile) * L);
  }
};

// One block of one batch entry.
template <class T, class A = typename StateOf<T>::type>
struct Forward {
  const PropagateCall& call;
  const PropagatePlan& plan;
  Channels channels;
  Packed<A> packed;
  ForwardScratch<A> scratch;
  static constexpr int L = kLanes<A>;

  Forward(const PropagateCall& call, const PropagatePlan& plan, int64_t batch, int64_t block, Scratch pieces)
      : call(call),
        plan(plan),
        channels(call, batch, block, L),
        packed(call, plan, block),
        scratch(pieces, call, plan, channels.count) {}

  Rectangle all() const { return {0, call.height, 0, call.width}; }
  static Tile<A> tile_of(A* data, const Rectangle& at, const Walk& walk) {
    return walk.columns ? Tile<A>::by_columns(data, at) : Tile<A>::by_rows(data, at);
  }
  int64_t tile_lines(const Walk& walk) const { return walk.columns ? plan.column_tile : plan.row_tile; }

  void clear_state(const Walk& walk) const {
    for (A* line : scratch.state) clear(line, (walk.cross + 2) * L);
  }

  // Steps [first, last) of direction d over a tile; the state continues from what the steps before have left.
  void scan(int64_t d, const Walk& walk, const Tile<A>& x, const Tile<A>& y, int64_t first, int64_t last) const {
    dispatch_on_proxy_channels<A>(call.proxy_channels, [&](auto number) {
      constexpr int S = decltype(number)::value;
      plan.shared ? scan_with<S, true>(d, walk, x, y, first, last) : scan_with<S, false>(d, walk, x, y, first, last);
    });
  }

  template <int S, bool kShared>
  void scan_with(int64_t d, const Walk& walk, const Tile<A>& x_tile, const Tile<A>& y_tile, int64_t first,
                 int64_t last) const {
    const TileLines<A> x(x_tile, walk.columns), y(y_tile, walk.columns);
    const ProxyLines<A> proxy(call, channels.batch, walk.columns);
    ForwardLine<A> line;
    line.cross = walk.cross;
    line.x_cross = x.cross, line.y_cross = y.cross;
    line.weights = packed.direction(d), line.to_t = packed.to_t();
    line.taps = scratch.taps, line.tap_pitch = walk.cross + L;
    line.fetch = plan.fetch;
    for (int64_t step = first; step < last; ++step) {
      const int64_t l = walk.line(step);
      line.x = x.at(l), line.y = y.at(l), line.proxy = proxy.at(l);
      line.prev = scratch.state[1 - step % 2] + L, line.state = scratch.state[step % 2] + L;
      if (walk.starts_segment(step)) {
        forward_line<A, S, kShared, false, true>(line);
      } else {
        if constexpr (kShared)
          shared_taps<A, S>(line.proxy, line.cross, packed.taps(d), line.to_t, scratch.taps, line.tap_pitch);
        forward_line<A, S, kShared, true, true>(line);
      }
    }
  }

  // One span of one direction, to a part of its own.
  void run_separately(int64_t d, int64_t span) const {
    A* part = static_cast<A*>(plan.parts) +
              ((d * call.batch + channels.batch) * plan.blocks + channels.block) * plan.pixels * L;
    const Tile<A> y = Tile<A>::by_rows(part, all());
    const Walk walk(call, d);
    const int64_t segments = (walk.lines + walk.segment - 1) / walk.segment, lines = tile_lines(walk);
    const int64_t last = minimum(segments * (span + 1) / plan.spans * walk.segment, walk.lines);
    clear_state(walk);
    for (int64_t step = segments * span / plan.spans * walk.segment; step < last; step += lines) {
      const int64_t end = minimum(step + lines, last);
      const Rectangle at = walk.rectangle(step, end);
      const Tile<A> x = tile_of(scratch.x, at, walk);
      read_block<T>(call.x, channels, x);
      for (int64_t i = 0; i < at.rows; ++i) clear(y.pixel(at.row + i, at.column), at.columns * L);
      scan(d, walk, x, y, step, end);
    }
  }

  // All directions, x and y walked where they are.
  void run_directly() const {
    const auto in_place = [&](const Image& image) {
      return Tile<A>{reinterpret_cast<A*>(pixel_of<T>(image, channels, 0, 0)), all(), image.row, image.column};
    };
    const Tile<A> x = in_place(call.x), y = in_place(call.y);
    for (int64_t d = 0; d < call.direction_count; ++d) {
      const Walk walk(call, d);
      clear_state(walk);
      // The first direction finds in the caches what the skip has just read and written.
      const int64_t lines = d > 0 ? walk.lines : tile_lines(walk);
      for (int64_t step = 0; step < walk.lines; step += lines) {
        const int64_t end = minimum(step + lines, walk.lines);
        const Rectangle at = walk.rectangle(step, end);
        if (d == 0) start_with_skip<A>(call, packed, channels.batch, x.part(at), y.part(at));
        scan(d, walk, x, y, step, end);
      }
    }
  }

  // All directions, x and y staged: as whole images where they are kept, else a tile at a time.
  void run_staged() const {
    // A whole block of a dense y has the size of its image: it is gathered there, and transposed by way of x's.
    A* y_memory = scratch.y ? scratch.y : reinterpret_cast<A*>(pixel_of<T>(call.y, channels, 0, 0));
    const Tile<A> kept_x = Tile<A>::by_rows(scratch.x, all()), kept_y = Tile<A>::by_rows(y_memory, all());
    if (plan.keep_x) read_block<T>(call.x, channels, kept_x);
    for (int64_t d = 0; d < call.direction_count; ++d) {
      const Walk walk(call, d);
      clear_state(walk);
      const int64_t lines = plan.keep_x ? walk.lines : tile_lines(walk);
      for (int64_t step = 0; step < walk.lines; step += lines) {
        const int64_t end = minimum(step + lines, walk.lines);
        const Rectangle at = walk.rectangle(step, end);
        const Tile<A> x = plan.keep_x ? kept_x.part(at) : tile_of(scratch.x, at, walk);
        const Tile<A> y = plan.keep_y ? kept_y.part(at) : tile_of(y_memory, at, walk);
        if (!plan.keep_x) read_block<T>(call.x, channels, x);
        if (d == 0) {
          start_with_skip<A>(call, packed, channels.batch, x, y);
        } else if (!plan.keep_y) {
          read_block<T>(call.y, channels, y);
        }
        scan(d, walk, x, y, step, end);
        if (!plan.keep_y) write_block<T>(y, call.y, channels);
      }
    }
    if (!scratch.y) {
      memcpy(scratch.x, y_memory, static_cast<size_t>(call.pixels() * L) * sizeof(A));
      write_block<T>(kept_x, call.y, channels);
    } else if (plan.keep_y) {
      write_block<T>(kept_y, call.y, channels);
    }
  }
};

template <class T>
void forward(const PropagateCall& all, const PropagatePlan& plan, int64_t index, char* memory) {
  const int64_t span = index % plan.spans;
  index /= plan.spans;
  const int64_t direction = plan.separate ? index % all.direction_count : 0;
  if (plan.separate) index /= all.direction_count;
  PropagateCall own;
  const PropagateCall& call = all.of_image(index / plan.blocks, own);
  const Forward<T> block(call, plan, index / plan.blocks, index % plan.blocks, Scratch(memory));
  if (plan.separate) {
    block.run_separately(direction, span);
  } else if (plan.direct && block.channels.count == block.L) {
    block.run_directly();
  } else {
    block.run_staged();
  }
  if (!plan.separate) clear_padding_of<T>(all, call, call.y, block.channels);
}

}  // namespace

extern const PropagateKernel propagate_forward;
const PropagateKernel propagate_forward = {
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t item, char* scratch) {
      dispatch_on_dtype(call.dtype, [&](auto type) { forward<decltype(type)>(call, plan, item, scratch); });
    },
    [](const PropagateCall& call, const PropagatePlan& plan) {
      // The last block, which may be partly empty, needs the most.
      return dispatch_on_state(call.dtype, [&](auto state) {
        return scratch_bytes<ForwardScratch<decltype(state)>>(call, plan, call.channels);
      });
    },
};

}  // namespace gspn::GSPN_ISA
