"""The scan of ``propagate`` and its adjoint: one kernel that computes its maps line by line, in registers alone.

A program takes a block of channels of one batch entry through a run of lines in one direction. For every line it reads
S rows of the proxy, once for all its channels, and from them come logits, taps and gates by ``5 S`` multiply-adds a
pixel (``3 S / channels + 2 S`` where the channels share taps). The proxy has been laid out along the lines already, so
that its rows are contiguous in every direction; the images are walked as they are, in tiles of several lines where
memory is contiguous along the scan.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import anchor, load_lines, locate, place, store_lines, stride
from .neighbour_shuffle import neighbours


@triton.jit
def weights_at(
    tap_ptr, gate_ptr, out_gate_ptr, skip_ptr, tap_at, at, tap_exists, exists, s,
    S: tl.constexpr, GATED: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """The weights of proxy channel ``s`` for each map: three taps, the gates before and after the scan, the skip."""
    before = tl.load(tap_ptr + tap_at + s, mask=tap_exists, other=0.0)
    here = tl.load(tap_ptr + tap_at + S + s, mask=tap_exists, other=0.0)
    after = tl.load(tap_ptr + tap_at + 2 * S + s, mask=tap_exists, other=0.0)
    gate = tl.load(gate_ptr + at + s, mask=exists, other=0.0)
    out_gate = gate
    if GATED:
        out_gate = tl.load(out_gate_ptr + at + s, mask=exists, other=0.0)
    skip = gate
    if HAS_SKIP:
        skip = tl.load(skip_ptr + at + s, mask=exists, other=0.0)
    return before, here, after, gate, out_gate, skip


@triton.jit
def line_maps(
    rows_ptr, plane, inside, weights, tap_ptr, gate_ptr, out_gate_ptr, skip_ptr, tap_at, at, tap_exists, exists,
    S: tl.constexpr, UNROLL: tl.constexpr, GATED: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """The maps ``[C, N]`` (taps ``[1, N]`` where shared) at pixels whose proxy begins at ``rows_ptr [1, N]``.

    With UNROLL the weights are given, a tuple of six for each channel of the proxy; else they are loaded again.
    """
    before = tl.zeros([tap_at.shape[0], rows_ptr.shape[1]], tl.float32)
    here, after = before, before
    gate = tl.zeros([at.shape[0], rows_ptr.shape[1]], tl.float32)
    out_gate, skip = gate, gate
    if UNROLL:
        for s in tl.static_range(S):
            p = tl.load(rows_ptr + s * plane, mask=inside, other=0.0).to(tl.float32)
            before += weights[6 * s] * p
            here += weights[6 * s + 1] * p
            after += weights[6 * s + 2] * p
            gate += weights[6 * s + 3] * p
            if GATED:
                out_gate += weights[6 * s + 4] * p
            if HAS_SKIP:
                skip += weights[6 * s + 5] * p
    else:
        for s in tl.range(0, S):
            p = tl.load(rows_ptr + s * plane, mask=inside, other=0.0).to(tl.float32)
            w0, w1, w2, w3, w4, w5 = weights_at(
                tap_ptr, gate_ptr, out_gate_ptr, skip_ptr, tap_at, at, tap_exists, exists, s, S, GATED, HAS_SKIP
            )
            before += w0 * p
            here += w1 * p
            after += w2 * p
            gate += w3 * p
            if GATED:
                out_gate += w4 * p
            if HAS_SKIP:
                skip += w5 * p
    return before, here, after, gate, out_gate, skip


@triton.jit
def stochastic(before, here, after, has_left, has_right):
    """Logits to sigmoids that sum to one over the neighbours that exist; 0 for the others.

    ``sigmoid(a) = exp(min(a, 0)) / (1 + exp(-|a|))``, and what is largest under the exponentials of the numerators is
    taken out of all three: finite for logits of any size.
    """
    low_before = tl.where(has_left, tl.minimum(before, 0.0), float("-inf"))
    low_here = tl.minimum(here, 0.0)
    low_after = tl.where(has_right, tl.minimum(after, 0.0), float("-inf"))
    largest = tl.maximum(low_here, tl.maximum(low_before, low_after))
    # Over a common denominator, whose factors are between 1 and 2: one division for all.
    of_before = 1.0 + tl.exp(-tl.abs(before))
    of_here = 1.0 + tl.exp(-tl.abs(here))
    of_after = 1.0 + tl.exp(-tl.abs(after))
    before = tl.exp(low_before - largest) * of_here * of_after
    here = tl.exp(low_here - largest) * of_before * of_after
    after = tl.exp(low_after - largest) * of_before * of_here
    inverse = 1.0 / (before + here + after)
    return before * inverse, here * inverse, after * inverse


@triton.jit(
    do_not_specialize=[
        "in_batch", "in_channel", "in_cross", "in_line", "out_batch", "out_channel", "out_cross", "out_line",
        "channels", "tap_channels", "width", "lines", "chunk", "chunks", "segment",
    ]
)  # fmt: skip
def scan_kernel(
    in_ptr, before_ptr, out_ptr, proxy_ptr, tap_ptr, gate_ptr, out_gate_ptr, skip_ptr, states_ptr,
    in_batch, in_channel, in_cross, in_line,
    out_batch, out_channel, out_cross, out_line,
    channels, tap_channels, width, lines, chunk, chunks, segment,
    IN_FAST: tl.constexpr, OUT_FAST: tl.constexpr, FAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, HALO: tl.constexpr, LINES: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr,
    S: tl.constexpr, UNROLL: tl.constexpr,
    ADJOINT: tl.constexpr, GATED: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A scan of ``gate * in``: its states, or GATED ``out_gate * state``, to which HAS_SKIP adds ``skip * in``.

    With ADD, what is stored is added to ``before``, which has the strides of ``out``. With ADJOINT the scan runs
    against its direction by the transposed taps. ``proxy`` is ``[B, S, lines, width]``, contiguous.

    Rows longer than a block and ``states_ptr [programs, 2, BLOCK_C, width]`` are those of the line scan's kernels.
    """
    if FAST == 0:
        channels *= ALIGN
    elif FAST == 1:
        width *= ALIGN
    else:
        lines *= ALIGN
        chunk *= ALIGN
    block, _, batch, start, low, high = locate(tl.cdiv(channels, BLOCK_C), 1, lines, chunk, chunks, REVERSE)
    c, n = tl.arange(0, BLOCK_C)[:, None, None], tl.arange(0, BLOCK_N)[None, :, None]
    t = tl.arange(0, LINES)[None, None, :]
    exists = block * BLOCK_C + c < channels
    first_channel = (block * BLOCK_C).to(tl.int64)

    in_ptr = anchor(in_ptr, batch, first_channel, in_batch, in_channel, IN_FAST, ALIGN)
    in_at = place(c.to(tl.int64), n.to(tl.int64), t.to(tl.int64), in_channel, in_cross, in_line, IN_FAST, ALIGN)
    in_line, in_cross = stride(in_line, 2, IN_FAST, ALIGN), stride(in_cross, 1, IN_FAST, ALIGN)
    out_ptr = anchor(out_ptr, batch, first_channel, out_batch, out_channel, OUT_FAST, ALIGN)
    before_ptr = anchor(before_ptr, batch, first_channel, out_batch, out_channel, OUT_FAST, ALIGN)
    out_at = place(c.to(tl.int64), n.to(tl.int64), t.to(tl.int64), out_channel, out_cross, out_line, OUT_FAST, ALIGN)
    out_line, out_cross = stride(out_line, 2, OUT_FAST, ALIGN), stride(out_cross, 1, OUT_FAST, ALIGN)

    channel, cross = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    channel_exists = block * BLOCK_C + channel < channels
    held = channel_exists & (cross >= HALO) & (cross < BLOCK_N - HALO)
    plane = lines.to(tl.int64) * width
    proxy_ptr += batch * S * plane
    at = (block * BLOCK_C + channel) * S
    if SHARED:
        # The whole block is in one group.
        tap_channel = block * BLOCK_C + tl.arange(0, 1)[:, None]
        tap_exists = tap_channel >= 0
    else:
        tap_channel = block * BLOCK_C + channel
        tap_exists = channel_exists
    tap_at = tap_channel // tap_channels * (3 * S)
    weights = ()
    if UNROLL:
        for s in tl.static_range(S):
            weights = weights + weights_at(
                tap_ptr, gate_ptr, out_gate_ptr, skip_ptr, tap_at, at, tap_exists, channel_exists, s,
                S, GATED, HAS_SKIP,
            )  # fmt: skip

    state = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    TILES: tl.constexpr = HALO // LINES if HALO > 0 else 1
    MAY_OVERRUN: tl.constexpr = TILES * LINES > 1
    visits = TILES
    if HALO > 0:
        visits = tl.cdiv(width, BLOCK_N - 2 * HALO) * TILES
        states_ptr += tl.program_id(0).to(tl.int64) * 2 * BLOCK_C * width
        state_at = cross * BLOCK_C + channel if FAST == 0 else channel * width + cross
    rounds = tl.cdiv(high - low, TILES * LINES)
    for k in tl.range(0, rounds, num_stages=STAGES):
        for visit in tl.range(0, visits, num_stages=STAGES):
            if ADJOINT:
                step = ((rounds - k) * TILES - 1 - visit % TILES) * LINES
            else:
                step = (k * TILES + visit % TILES) * LINES
            line = lines - start - step - LINES if REVERSE else start + step
            line64 = line.to(tl.int64)
            shift = visit // TILES * (BLOCK_N - 2 * HALO) - HALO
            shift64 = shift.to(tl.int64)
            inside = exists & (shift + n >= 0) & (shift + n < width)
            if MAY_OVERRUN:
                inside = inside & (line + t >= low) & (line + t < high)
            owned = inside & (n >= HALO) & (n < BLOCK_N - HALO)
            inputs = load_lines(in_ptr + line64 * in_line + shift64 * in_cross, in_at, inside, LINES, REVERSE)
            out_now = line64 * out_line + shift64 * out_cross
            befores = inputs
            if ADD:
                befores = load_lines(before_ptr + out_now, out_at, owned, LINES, REVERSE)
            position = shift + cross
            has_left, has_right = position > 0, position < width - 1
            if HALO > 0:
                arrives = visit % TILES == 0
                reach = tl.where(arrives, tl.where(k > 0, width, 0), 0)
                now = states_ptr + (k % 2) * BLOCK_C * width + shift * (BLOCK_C if FAST == 0 else 1)
                waiting = tl.load(now + state_at, mask=channel_exists & (position >= 0) & (position < reach), other=0.0)
                state = tl.where(arrives, waiting, state)

            results = ()
            # Numbered in the order of the scan, which an adjoint takes backwards.
            for i in tl.static_range(LINES - 1 if ADJOINT else 0, -1 if ADJOINT else LINES, -1 if ADJOINT else 1):
                in_memory = line + LINES - 1 - i if REVERSE else line + i
                row_width = width
                if MAY_OVERRUN:
                    row_width = tl.where(in_memory >= low, tl.where(in_memory < high, width, 0), 0)
                row_inside = (position >= 0) & (position < row_width)
                rows_ptr = proxy_ptr + in_memory.to(tl.int64) * width + position
                before, here, after, gate, out_gate, skip = line_maps(
                    rows_ptr, plane, row_inside, weights, tap_ptr, gate_ptr, out_gate_ptr, skip_ptr,
                    tap_at, at, tap_exists, channel_exists, S, UNROLL, GATED, HAS_SKIP,
                )  # fmt: skip
                before, here, after = stochastic(before, here, after, has_left, has_right)
                pixel = inputs[i].to(tl.float32)
                phase = step + i
                if SEGMENTED:
                    phase = phase % segment
                # Values from where no neighbour is are left out by a select: they may be anything.
                if ADJOINT:
                    result = gate * pixel + state
                    left, right = neighbours(after * result, before * result, VECTOR)
                    carried = here * result + tl.where(has_left, left, 0.0) + tl.where(has_right, right, 0.0)
                    state = tl.where(phase != 0, carried, 0.0)
                else:
                    left, right = neighbours(state, state, VECTOR)
                    carried = here * state
                    carried += tl.where(has_left, before * left, 0.0)
                    carried += tl.where(has_right, after * right, 0.0)
                    state = gate * pixel + tl.where(phase != 0, carried, 0.0)
                    result = state
                if GATED:
                    result = out_gate * result
                if HAS_SKIP:
                    result += skip * pixel
                if ADD:
                    result += befores[i].to(tl.float32)
                if ADJOINT:
                    results = (result,) + results
                else:
                    results = results + (result,)
            store_lines(out_ptr + out_now, out_at, results, owned, LINES, REVERSE)
            if HALO > 0:
                reach = tl.where(visit % TILES == TILES - 1, width, 0)
                then = states_ptr + ((k + 1) % 2) * BLOCK_C * width + shift * (BLOCK_C if FAST == 0 else 1)
                tl.store(then + state_at, state, mask=held & (position < reach))
        if HALO > 0:
            # What the next lines receive comes from other threads.
            tl.debug_barrier()
