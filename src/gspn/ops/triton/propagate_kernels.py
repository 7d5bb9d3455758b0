"""The scans of ``propagate``: forward and adjoint, which compute their maps in registers.

A program takes a block of channels of one batch entry through a run of lines in one direction. For every line it reads
S rows of the proxy, once for all its channels, and from them come logits, taps and gates by ``5 S`` multiply-adds a
pixel (``3 S / channels + 2 S`` where the channels share taps). The proxy has been laid out along the lines already, so
that its rows are contiguous in every direction; the images are walked as they are, in tiles of several lines where
memory is contiguous along the scan.

The prefixes of names, tiles and views are explained in :mod:`.addressing`; the constexpr arguments are what
:mod:`.planner` chooses. A line's neighbours are named by where they are on it: before, here and after.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import (
    in_elements,
    integers,
    load_lines,
    load_state,
    move,
    share,
    states,
    store_lines,
    store_state,
    tile,
    view,
)  # fmt: skip
from .neighbour_shuffle import neighbours

# --- The maps of a pixel ----------------------------------------------------------------------------------------------


@triton.jit
def _weights(p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels, i_s, S: tl.constexpr):
    """The weights of proxy channel ``i_s`` for each map: three taps, the gates before and after the scan, the skip."""
    b_before = tl.load(p_taps + o_taps + i_s, mask=m_taps, other=0.0)
    b_here = tl.load(p_taps + o_taps + S + i_s, mask=m_taps, other=0.0)
    b_after = tl.load(p_taps + o_taps + 2 * S + i_s, mask=m_taps, other=0.0)
    b_gate = tl.load(p_gate + o_gates + i_s, mask=m_channels, other=0.0)
    b_out_gate, b_skip = b_gate, b_gate
    if p_out_gate is not None:
        b_out_gate = tl.load(p_out_gate + o_gates + i_s, mask=m_channels, other=0.0)
    if p_skip is not None:
        b_skip = tl.load(p_skip + o_gates + i_s, mask=m_channels, other=0.0)
    return b_before, b_here, b_after, b_gate, b_out_gate, b_skip


@triton.jit
def _maps(
    p_pixels, s_plane, m_pixels, weights, p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels,
    S: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The maps ``[C, N]`` (taps ``[1, N]`` where shared) at pixels whose proxy begins at ``p_pixels [1, N]``.

    With UNROLL ``weights`` are a tuple of six for each channel of the proxy; else they are loaded again.
    """
    b_before = tl.zeros([o_taps.shape[0], p_pixels.shape[1]], tl.float32)
    b_here, b_after = b_before, b_before
    b_gate = tl.zeros([o_gates.shape[0], p_pixels.shape[1]], tl.float32)
    b_out_gate, b_skip = b_gate, b_gate
    if UNROLL:
        for s in tl.static_range(S):
            b_p = tl.load(p_pixels + s * s_plane, mask=m_pixels, other=0.0).to(tl.float32)
            b_before += weights[6 * s] * b_p
            b_here += weights[6 * s + 1] * b_p
            b_after += weights[6 * s + 2] * b_p
            b_gate += weights[6 * s + 3] * b_p
            if p_out_gate is not None:
                b_out_gate += weights[6 * s + 4] * b_p
            if p_skip is not None:
                b_skip += weights[6 * s + 5] * b_p
    else:
        for s in tl.range(0, S):
            b_p = tl.load(p_pixels + s * s_plane, mask=m_pixels, other=0.0).to(tl.float32)
            w = _weights(p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels, s, S)
            b_before += w[0] * b_p
            b_here += w[1] * b_p
            b_after += w[2] * b_p
            b_gate += w[3] * b_p
            if p_out_gate is not None:
                b_out_gate += w[4] * b_p
            if p_skip is not None:
                b_skip += w[5] * b_p
    return b_before, b_here, b_after, b_gate, b_out_gate, b_skip


@triton.jit
def _stochastic(b_before, b_here, b_after, m_has_left, m_has_right):
    """Logits to sigmoids that sum to one over the neighbours that exist; 0 for the others.

    ``sigmoid(a) = exp(min(a, 0)) / (1 + exp(-|a|))``, and what is largest under the exponentials of the numerators is
    taken out of all three: finite for logits of any size, and equal where all of them are ``-inf``.
    """
    LOWEST: tl.constexpr = -3.4028234663852886e38
    b_low_before = tl.where(m_has_left, tl.maximum(tl.minimum(b_before, 0.0), LOWEST), float("-inf"))
    b_low_here = tl.maximum(tl.minimum(b_here, 0.0), LOWEST)
    b_low_after = tl.where(m_has_right, tl.maximum(tl.minimum(b_after, 0.0), LOWEST), float("-inf"))
    b_largest = tl.maximum(b_low_here, tl.maximum(b_low_before, b_low_after))
    # Over a common denominator, whose factors are between 1 and 2: one division for all.
    b_of_before = tl.where(m_has_left, 1.0 + tl.exp(-tl.abs(b_before)), 1.0)
    b_of_here = 1.0 + tl.exp(-tl.abs(b_here))
    b_of_after = tl.where(m_has_right, 1.0 + tl.exp(-tl.abs(b_after)), 1.0)
    b_before = tl.exp(b_low_before - b_largest) * b_of_here * b_of_after
    b_here = tl.exp(b_low_here - b_largest) * b_of_before * b_of_after
    b_after = tl.exp(b_low_after - b_largest) * b_of_before * b_of_here
    b_inverse = 1.0 / (b_before + b_here + b_after)
    return b_before * b_inverse, b_here * b_inverse, b_after * b_inverse


# --- Scans ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*integers("in", "out"), "n_per_group"])
def scan_kernel(
    p_in, s_in_batch, s_in_channel, s_in_cross, s_in_line,
    p_out, s_out_batch, s_out_channel, s_out_cross, s_out_line,
    p_before, p_proxy, p_taps, p_gate, p_out_gate, p_skip,
    p_states, n_groups, n_channels, n_per_group, n_cross, n_lines, n_run, n_runs, n_segment,
    FAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, HALO: tl.constexpr, LINES: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr,
    S: tl.constexpr, UNROLL: tl.constexpr, ADJOINT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A scan of ``gate * in``: its states, or ``out_gate * state`` if there is an output gate, plus ``skip * in``.

    The sum is added to ``before``, which has the strides of ``out``, if there is one. With ADJOINT the scan runs
    against its direction by the transposed taps. ``proxy`` is ``[B, S, lines, cross]``, contiguous. A block's
    channels may be of several groups of ``n_per_group`` channels, unless taps are SHARED.
    """
    n_channels, n_cross, n_lines, n_run = in_elements(n_channels, n_cross, n_lines, n_run, FAST, ALIGN)
    mine = share(tl.cdiv(n_channels, BLOCK_C), n_groups, n_lines, n_run, n_runs, REVERSE)
    c, n = tl.arange(0, BLOCK_C)[:, None, None], tl.arange(0, BLOCK_N)[None, :, None]
    t = tl.arange(0, LINES)[None, None, :]
    m_tile_channels = mine.i_block * BLOCK_C + c < n_channels
    i_channel = (mine.i_block * BLOCK_C).to(tl.int64)
    o_c, o_n, o_t = c.to(tl.int64), n.to(tl.int64), t.to(tl.int64)
    o_tile, s_out = (o_c, o_n, o_t), (s_out_batch, s_out_channel, s_out_cross, s_out_line)
    x = view(p_in, mine.i_batch, i_channel, o_tile, (s_in_batch, s_in_channel, s_in_cross, s_in_line), ALIGN)
    out = view(p_out, mine.i_batch, i_channel, o_tile, s_out, ALIGN)
    before = out
    if p_before is not None:
        before = view(p_before, mine.i_batch, i_channel, o_tile, s_out, ALIGN)

    channel, cross = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m_channels = mine.i_block * BLOCK_C + channel < n_channels
    m_kept = m_channels & (cross >= HALO) & (cross < BLOCK_N - HALO)
    s_plane = n_lines.to(tl.int64) * n_cross
    p_proxy += mine.i_batch * S * s_plane
    o_gates = (mine.i_block * BLOCK_C + channel) * S
    if SHARED:
        # The whole block is in one group.
        i_tap_channel = mine.i_block * BLOCK_C + tl.arange(0, 1)[:, None]
        m_taps = i_tap_channel >= 0
    else:
        i_tap_channel = mine.i_block * BLOCK_C + channel
        m_taps = m_channels
    o_taps = i_tap_channel // n_per_group * (3 * S)
    weights = ()
    if UNROLL:
        for s in tl.static_range(S):
            weights = weights + _weights(p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels, s, S)

    b_state = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    TILES: tl.constexpr = HALO // LINES if HALO > 0 else 1
    MAY_OVERRUN: tl.constexpr = TILES * LINES > 1
    n_visits = tl.cdiv(n_cross, BLOCK_N - 2 * HALO) * TILES if HALO > 0 else TILES
    between = states(p_states, channel, cross, n_cross, BLOCK_C, FAST)
    n_rounds = tl.cdiv(mine.i_high - mine.i_low, TILES * LINES)

    for i_round in tl.range(0, n_rounds, num_stages=STAGES):
        for i_visit in tl.range(0, n_visits, num_stages=STAGES):
            i_step, i_line, i_first = tile(
                i_round, i_visit, n_rounds, mine, n_lines, BLOCK_N, HALO, LINES, TILES, ADJOINT, REVERSE
            )
            m = m_tile_channels & (i_first + n >= 0) & (i_first + n < n_cross)
            if MAY_OVERRUN:
                m = m & (i_line + t >= mine.i_low) & (i_line + t < mine.i_high)
            m_owned = m & (n >= HALO) & (n < BLOCK_N - HALO)
            b_in = load_lines(move(x, i_line, i_first), m, LINES, REVERSE)
            b_added = b_in
            if p_before is not None:
                b_added = load_lines(move(before, i_line, i_first), m_owned, LINES, REVERSE)
            i_cross = i_first + cross
            m_has_left, m_has_right = i_cross > 0, i_cross < n_cross - 1
            b_state = load_state(b_state, between, i_round, i_visit, i_first, i_cross, n_cross, BLOCK_C, TILES, FAST)

            b_out = ()
            # Numbered in the order of the scan, which an adjoint takes backwards.
            for i in tl.static_range(LINES - 1 if ADJOINT else 0, -1 if ADJOINT else LINES, -1 if ADJOINT else 1):
                i_row = i_line + LINES - 1 - i if REVERSE else i_line + i
                n_row = n_cross
                if MAY_OVERRUN:
                    n_row = tl.where(i_row >= mine.i_low, tl.where(i_row < mine.i_high, n_cross, 0), 0)
                b_before, b_here, b_after, b_gate, b_out_gate, b_skip = _maps(
                    p_proxy + i_row.to(tl.int64) * n_cross + i_cross, s_plane, (i_cross >= 0) & (i_cross < n_row),
                    weights, p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels, S, UNROLL,
                )  # fmt: skip
                b_before, b_here, b_after = _stochastic(b_before, b_here, b_after, m_has_left, m_has_right)
                b_pixel = b_in[i].to(tl.float32)
                i_phase = i_step + i
                if SEGMENTED:
                    i_phase = i_phase % n_segment
                # Values from where no neighbour is are left out by a select: they may be anything.
                if ADJOINT:
                    b = b_gate * b_pixel + b_state
                    b_left, b_right = neighbours(b_after * b, b_before * b, VECTOR)
                    b_carried = b_here * b + tl.where(m_has_left, b_left, 0.0) + tl.where(m_has_right, b_right, 0.0)
                    b_state = tl.where(i_phase != 0, b_carried, 0.0)
                else:
                    b_left, b_right = neighbours(b_state, b_state, VECTOR)
                    b_carried = b_here * b_state
                    b_carried += tl.where(m_has_left, b_before * b_left, 0.0)
                    b_carried += tl.where(m_has_right, b_after * b_right, 0.0)
                    b_state = b_gate * b_pixel + tl.where(i_phase != 0, b_carried, 0.0)
                    b = b_state
                if p_out_gate is not None:
                    b = b_out_gate * b
                if p_skip is not None:
                    b += b_skip * b_pixel
                if p_before is not None:
                    b += b_added[i].to(tl.float32)
                if ADJOINT:
                    b_out = (b,) + b_out
                else:
                    b_out = b_out + (b,)
            store_lines(move(out, i_line, i_first), 0, b_out, m_owned, LINES, REVERSE)
            store_state(b_state, between, i_round, i_visit, i_first, i_cross, n_cross, m_kept, BLOCK_C, TILES, FAST)
        if HALO > 0:
            # The next round's states come from other threads.
            tl.debug_barrier()
