// propagate's entry points: cuts a call into items and spreads them over threads.
#include "propagate.h"
#include "workers.h"

namespace gspn {
namespace {

// Pictures of a block up to this size stay in scratch while it is walked: they are then read and written once, in place of
// once a direction. Two of them take what a second-level cache holds or a little more; beyond, they come from where x does.
constexpr int64_t kMostKept = int64_t{4} << 20;
// Where keeping x as well as y would take more than this part of x's size in scratch (few channels, many threads, large
// pictures), x is staged again for each direction. Small pictures are kept in any case.
constexpr int64_t kMostScratch = 12, kSmall = int64_t{512} << 10;
// A tile where not all is kept: rows that fit the second-level cache, and columns enough for whole cache lines of a row of
// x where its rows are dense.
constexpr int64_t kTileBytes = int64_t{256} << 10, kTileColumns = 16;

PropagatePlan plan(const PropagateCall& call, int64_t vector_bytes, int64_t threads) {
  PropagatePlan plan{};
  const auto state = static_cast<int64_t>(size_of_state(call.dtype));
  const int64_t lanes = vector_bytes / state;
  const int64_t pixels = call.height * call.width, longest = call.height > call.width ? call.height : call.width;
  plan.blocks = round_up(call.channels, lanes) / lanes;
  plan.shared = call.groups == 1 || call.channels / call.groups % lanes == 0;
  plan.spans = 1;
  plan.items = call.batch * plan.blocks;
  plan.apart = plan.items < threads;
  if (plan.apart) {
    plan.items *= call.directions;
    const int64_t segments = longest / call.segment;
    if (segments > 1 && plan.items < 4 * threads) {
      plan.spans = round_up(4 * threads, plan.items) / plan.items;
      if (plan.spans > segments) plan.spans = segments;
      plan.items *= plan.spans;
    }
  }
  const int64_t kept = pixels * vector_bytes;
  const int64_t x_bytes = call.batch * call.channels * pixels * static_cast<int64_t>(size_of(call.dtype));
  const int64_t workers = plan.items < threads ? plan.items : threads;
  const bool dense = call.y.column == 1 && call.y.row == call.width && call.y.channel == pixels;
  plan.y_in_place = dense && kept > kSmall && static_cast<int64_t>(size_of(call.dtype)) == state;
  const int64_t pictures = plan.y_in_place && call.channels % lanes == 0 ? 1 : 2;
  plan.keep_y = !plan.apart && kept <= kMostKept;
  plan.keep_x = plan.keep_y && (kept <= kSmall || kept * pictures * workers * kMostScratch <= x_bytes);
  plan.y_in_place = plan.y_in_place && plan.keep_x;
  plan.fetch = !plan.keep_x;
  plan.direct = !plan.apart && kept > kSmall && call.x.channel == 1 && call.y.channel == 1 &&
                static_cast<int64_t>(size_of(call.dtype)) == state;
  const auto lines_of = [&](int64_t cross, int64_t count, int64_t least) {
    int64_t lines = kTileBytes / (cross * vector_bytes);
    if (lines < least) lines = least;
    return lines < count ? lines : count;
  };
  plan.row_tile = lines_of(call.width, call.height, 1);
  plan.column_tile = lines_of(call.height, call.width, call.x.channel == 1 ? 2 : kTileColumns);
  const int64_t rows = plan.row_tile * call.width, columns = plan.column_tile * (call.height + 1);
  const int64_t picture = pixels * lanes, tile = (rows > columns ? rows : columns) * lanes;
  const int64_t states = 2 * (longest + 2) * lanes + 4 * (longest + lanes);
  plan.scratch_bytes = static_cast<size_t>(((plan.keep_x ? picture : tile) + (plan.y_in_place && pictures == 1 ? 0 : plan.keep_y ? picture : tile) + states) * state + 256);
  const int64_t outputs = plan.shared ? 2 : 5;
  plan.packed_size =
      round_up((call.directions * outputs + 1) * call.states * lanes + call.directions * 3 * call.states, lanes);
  return plan;
}

class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(std::malloc(bytes > 0 ? static_cast<size_t>(bytes) : 1)) {}
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

}  // namespace
}  // namespace gspn

using namespace gspn;

// 0, or 1 if memory ran out.
GSPN_EXPORT int32_t gspn_propagate(const PropagateCall* call, int64_t threads) {
  const Kernels& chosen = kernels();
  const PropagateKernels& kernel = chosen.propagate;
  const int64_t vector_bytes = chosen.vector_bytes;
  PropagatePlan p = plan(*call, vector_bytes, threads);
  const auto state = static_cast<int64_t>(size_of_state(call->dtype));
  const Memory packed(p.blocks * p.packed_size * state);
  const int64_t part = call->batch * p.blocks * call->height * call->width * vector_bytes;
  const Memory parts(p.apart ? call->directions * part : 0);
  if (!packed.get() || !parts.get()) return 1;
  p.packed = packed.get(), p.parts = parts.get();
  expect_first_touch(call->y.data, static_cast<size_t>(call->batch * call->channels * call->height * call->width) *
                                       size_of(call->dtype));
  bool done = run(p.blocks, 0, threads, [&](int64_t block, char*) { kernel.pack(*call, p, block); });
  done = done && run(p.items, p.scratch_bytes, threads,
                     [&](int64_t item, char* scratch) { kernel.forward(*call, p, item, scratch); });
  if (done && p.apart) {
    done = run(call->batch * p.blocks, p.scratch_bytes, threads,
               [&](int64_t item, char* scratch) { kernel.merge(*call, p, false, item, scratch); });
  }
  return done ? 0 : 1;
}

GSPN_EXPORT int32_t gspn_propagate_backward(const PropagateCall* call, int64_t threads) {
  const Kernels& chosen = kernels();
  const PropagateKernels& kernel = chosen.propagate;
  const int64_t vector_bytes = chosen.vector_bytes;
  PropagatePlan p = plan(*call, vector_bytes, threads);
  const auto state = static_cast<int64_t>(size_of_state(call->dtype));
  const int64_t lanes = vector_bytes / state, pixels = call->height * call->width;
  const int64_t longest = call->height > call->width ? call->height : call->width;
  // Enough chunks for every thread and some to spare; each costs a gradient of the proxy.
  p.chunks = round_up(2 * threads, call->batch) / call->batch;
  if (p.chunks > p.blocks) p.chunks = p.blocks;
  if (p.apart) p.chunks = p.blocks * call->directions;
  p.items = call->batch * p.chunks;
  p.fetch = pixels * vector_bytes > kSmall;
  p.weight_size = ((call->directions * (p.shared ? 2 : 5) + 1) + (p.shared ? 3 * call->directions : 0)) * call->states * lanes;
  const int64_t elements = (4 * pixels + 2 * (call->height + call->width)) * lanes + 6 * (longest + 2) * lanes +
                           4 * (longest + lanes) + 8 * lanes * lanes + (lanes * call->states + lanes) * lanes + 8 * call->states * lanes;
  p.scratch_bytes = static_cast<size_t>(elements * state + 64 * 16);

  const Memory packed(p.blocks * p.packed_size * state), weights(call->batch * p.blocks * p.weight_size * state);
  const Memory proxies(p.chunks > 1 ? p.chunks * call->batch * call->height * call->proxy_row * state : 0);
  const Memory parts(p.apart ? call->directions * call->batch * p.blocks * pixels * vector_bytes : 0);
  if (!packed.get() || !weights.get() || !proxies.get() || !parts.get()) return 1;
  p.packed = packed.get(), p.weight_parts = weights.get(), p.parts = parts.get();
  p.proxy_parts = p.chunks > 1 ? proxies.get() : call->dproxy;
  expect_first_touch(call->dx.data, static_cast<size_t>(call->batch * call->channels * pixels) * size_of(call->dtype));
  bool done = run(p.blocks, 0, threads, [&](int64_t block, char*) { kernel.pack(*call, p, block); });
  done = done && run(p.items, p.scratch_bytes, threads,
                     [&](int64_t item, char* scratch) { kernel.backward(*call, p, item, scratch); });
  if (done && p.chunks > 1) {
    done = run(call->batch, 0, threads, [&](int64_t batch, char*) { kernel.merge_proxy(*call, p, batch); });
  }
  if (done && p.apart) {
    done = run(call->batch * p.blocks, p.scratch_bytes, threads,
               [&](int64_t item, char* scratch) { kernel.merge(*call, p, true, item, scratch); });
  }
  if (done) kernel.merge_weights(*call, p);
  return done ? 0 : 1;
}

// The powers of two inside the taps, float32 (dtype 0) or float64 (1), for tests of their error.
GSPN_EXPORT void gspn_exp2(int32_t dtype, const void* in, void* out, int64_t count) {
  kernels().propagate.exp2(dtype, in, out, count);
}

// For memory that Python gives and fills: see expect_first_touch.
GSPN_EXPORT void gspn_expect_first_touch(void* data, int64_t bytes) { expect_first_touch(data, static_cast<size_t>(bytes)); }
