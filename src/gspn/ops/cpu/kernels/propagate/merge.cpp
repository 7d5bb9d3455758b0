// Before and after the items of a call: the projections in the order in which they are read, and the sums over parts.
#include "block.h"

namespace gspn::GSPN_ISA {
namespace {

template <class A>
void pack_block(const PropagateCall& call, const PropagatePlan& plan, int64_t block) {
  constexpr int L = kLanes<A>;
  const Packed<A> packed(call, plan, block);
  const int64_t S = call.proxy_channels, per_group = call.channels / call.groups;
  const A* tap_proj = static_cast<const A*>(call.tap_proj);
  const A* gates[2] = {static_cast<const A*>(call.lam_proj), static_cast<const A*>(call.u_proj)};
  const A* skip = static_cast<const A*>(call.skip_proj);
  const Channels channels(call, 0, block, L);
  const int64_t first = channels.first, count = channels.count;
  // Scaled, the largest of all numbers would be infinite.
  constexpr A most = static_cast<A>((sizeof(A) == 4 ? __FLT_MAX__ : __DBL_MAX__) / 1.5);
  const int64_t group = first / per_group, groups = (first + count - 1) / per_group + 1 - group;
  A scale = static_cast<A>(-kLog2E);
  for (int64_t d = 0; d < call.direction_count; ++d) {
    const A* taps = tap_proj + (d * call.groups + group) * 3 * S;
    for (int64_t i = 0; i < groups * 3 * S; ++i) {
      if (taps[i] > most || taps[i] < -most) scale = A(1);
    }
  }
  packed.scale() = scale;
  for (int64_t d = 0; d < call.direction_count; ++d) {
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

template <class A>
struct MergeScratch {
  A *in, *out;
  MergeScratch(Scratch& scratch, const PropagateCall& call) {
    in = scratch.take<A>(call.width * kLanes<A>);
    out = scratch.take<A>(call.width * kLanes<A>);
  }
};

// y = skip x, plus the directions that were computed separately, in their order; of a backward, dx = skip grad.
template <class T>
void merge_directions(const PropagateCall& all, const PropagatePlan& plan, int64_t index, char* memory) {
  using A = typename StateOf<T>::type;
  constexpr int L = kLanes<A>;
  const int64_t block = index % plan.blocks, batch = index / plan.blocks;
  PropagateCall own;
  const PropagateCall& call = all.of_image(batch, own);
  const Image &from = call.dx.data ? call.grad : call.x, &to = call.dx.data ? call.dx : call.y;
  const Channels channels(call, batch, block, L);
  const Packed<A> packed(call, plan, block);
  Scratch pieces(memory);
  const MergeScratch<A> scratch(pieces, call);
  for (int64_t row = 0; row < call.height; ++row) {
    const Rectangle at{row, 1, 0, call.width};
    const Tile<A> in = Tile<A>::by_rows(scratch.in, at), sum = Tile<A>::by_rows(scratch.out, at);
    if (call.skip_proj) read_block<T>(from, channels, in);
    start_with_skip<A>(call, packed, batch, in, sum);
    for (int64_t d = 0; d < call.direction_count; ++d) {
      const A* part = static_cast<const A*>(plan.parts) +
                      (((d * call.batch + batch) * plan.blocks + block) * plan.pixels + row * call.width) * L;
      for (int64_t i = 0; i < call.width * L; i += L) store(scratch.out + i, load(scratch.out + i) + load(part + i));
    }
    write_block<T>(sum, to, channels);
  }
  clear_padding_of<T>(all, call, to, channels);
}

template <class A>
void merge_proxy(const PropagateCall& call, const PropagatePlan& plan, int64_t batch) {
  const int64_t values = call.proxy_image;
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
  const int64_t S = call.proxy_channels, per_group = call.channels / call.groups;
  A* dtap = static_cast<A*>(call.dtap_proj);
  A* gates[2] = {static_cast<A*>(call.dlam_proj), static_cast<A*>(call.du_proj)};
  A* dskip = static_cast<A*>(call.dskip_proj);
  clear(dtap, call.direction_count * call.groups * 3 * S);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const auto sum = Packed<A>::gradients(call, plan, 0, block);
    for (int64_t batch = 1; batch < call.batch; ++batch) {
      const auto part = Packed<A>::gradients(call, plan, batch, block);
      for (int64_t i = 0; i < plan.weight_size; i += L) store(sum.base + i, load(sum.base + i) + load(part.base + i));
    }
    const Channels channels(call, 0, block, L);
    const int64_t first = channels.first, count = channels.count;
    const A scale = Packed<A>(call, plan, block).scale();
    for (int64_t d = 0; d < call.direction_count; ++d) {
      const A* in = sum.direction(d);
      for (int64_t s = 0; s < S; ++s, in += sum.outputs * L) {
        for (int64_t c = 0; c < count; ++c) {
          const int64_t channel = first + c;
          for (int64_t o = 0; o < 2; ++o) {
            gates[o][(d * call.channels + channel) * S + s] = in[(sum.outputs - 2 + o) * L + c];
          }
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

extern const PropagateKernel propagate_pack, propagate_merge_directions, propagate_merge_proxy, propagate_merge_weights;
const PropagateKernel propagate_pack = {
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t block, char*) {
      dispatch_on_state(call.dtype, [&](auto state) { pack_block<decltype(state)>(call, plan, block); });
    },
    nullptr,
};
const PropagateKernel propagate_merge_directions = {
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t item, char* scratch) {
      dispatch_on_dtype(call.dtype, [&](auto type) { merge_directions<decltype(type)>(call, plan, item, scratch); });
    },
    [](const PropagateCall& call, const PropagatePlan&) {
      return dispatch_on_state(call.dtype,
                               [&](auto state) { return scratch_bytes<MergeScratch<decltype(state)>>(call); });
    },
};
const PropagateKernel propagate_merge_proxy = {
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t batch, char*) {
      dispatch_on_state(call.dtype, [&](auto state) { merge_proxy<decltype(state)>(call, plan, batch); });
    },
    nullptr,
};
const PropagateKernel propagate_merge_weights = {
    [](const PropagateCall& call, const PropagatePlan& plan, int64_t, char*) {
      dispatch_on_state(call.dtype, [&](auto state) { merge_weights<decltype(state)>(call, plan); });
    },
    nullptr,
};

void exp2_of_all(int32_t dtype, const void* in, void* out, int64_t count) {
  dispatch_on_state(dtype, [&](auto state) {
    using A = decltype(state);
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const auto t = load_some<A>(static_cast<const A*>(in) + i, count - i);
      store_some<A>(static_cast<A*>(out) + i, exp2_of<A>(t), count - i);
    }
  });
}

}  // namespace gspn::GSPN_ISA
