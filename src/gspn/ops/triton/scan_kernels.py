"""The scan of ``propagate``, forward and adjoint, which computes its maps in registers.

**Lanes.** A row is cut into chunks of PIXELS pixels, and a lane, one thread, takes one chunk of one channel through a
run of lines: the weights of its channel, its states and all maps stay in its registers. Lanes go in groups of GROUP: a
warp, which then holds as many whole rows as fit and needs neither shared memory nor barriers, or all LANES of the
program for longer rows. Only the states at both ends of a chunk leave a lane, once a line.

**Maps.** For every line a lane reads the proxy at its pixels. From it come three logits and two gates by ``5 S``
multiply-adds a pixel, and the taps by three exponentials and four reciprocals. The proxy has been packed for this:
float32, by lines in the direction of the scan, in fours of channels that one load takes. The images are walked as they
are, in pieces of WIDTH elements along their contiguous axis: several pixels of a line, or the LINES of a tile.

The prefixes of names, tiles and views are explained in :mod:`.addressing`; the constexpr arguments are what
:mod:`.planner` chooses. A line's neighbours are named by where they are on it: before, here and after. What is there
for each pixel of a chunk is a tuple of ``[1, LANES]``; for each line as well, pixel by pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .addressing import (
    States,
    in_elements,
    integers,
    load_state,
    move,
    share,
    share_of_image,
    states,
    store_state,
    tile,
    view,
)  # fmt: skip
from .neighbour_shuffle import chunk_neighbours, join_lines, split_lines
from .taps import stochastic, within_reach


@triton.jit
def _rounded_product(a, b, PTX: tl.constexpr):
    """``a b``, which no later sum takes in before it is rounded: :func:`sum_kernel` has to give the same bits."""
    if PTX:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    else:
        return a * b


@triton.jit
def _in_order(swapped, a, b):
    """``a, b``, or ``b, a`` if ``swapped``."""
    return tl.where(swapped, b, a), tl.where(swapped, a, b)


class Projections(NamedTuple):
    """Where the weights of each lane's channel are: S numbers in a row for each map."""

    p_taps: Any
    o_taps: Any
    p_lam: Any
    p_u: Any
    o_gates: Any
    p_skip: Any
    o_skip: Any


@triton.jit
def _four_weights(p, o, i_four, S: tl.constexpr):
    """For each lane the ``i_four``-th four numbers of S; zeros beyond the last."""
    four = tl.arange(0, 4)[None, None, :] + i_four * 4
    if S % 4 == 0:
        return split_lines(tl.load(p + (o + four)), 4)
    else:
        return split_lines(tl.load(p + (o + four), mask=four < S, other=0.0), 4)


@triton.jit
def _weights(of, i_four, S: tl.constexpr, ADJOINT: tl.constexpr, GATED: tl.constexpr):
    """The weights of four channels of the proxy for each map, each map's four after the other's.

    Three taps times ``-log2(e)``, the gate of what goes in, and what there is of the gate of what comes out and of the
    skip.
    """
    weights = ()
    for k in tl.static_range(3):
        taps = _four_weights(of.p_taps + k * S, of.o_taps, i_four, S)
        for s in tl.static_range(4):
            weights = weights + (taps[s] * -1.4426950408889634,)
    weights = weights + _four_weights(of.p_u if ADJOINT else of.p_lam, of.o_gates, i_four, S)
    if GATED:
        weights = weights + _four_weights(of.p_u, of.o_gates, i_four, S)
    if of.p_skip is not None:
        weights = weights + _four_weights(of.p_skip, of.o_skip, i_four, S)
    return weights


@triton.jit
def _add_bounds(bounds, weights, p_largest, i_four):
    """Adds what four channels of the proxy may at most add to each of the three logits."""
    sums = ()
    for k in tl.static_range(3):
        b = bounds[k]
        for s in tl.static_range(4):
            b += tl.abs(weights[4 * k + s]) * tl.load(p_largest + i_four * 4 + s)
        sums = sums + (b,)
    return sums


@triton.jit
def _add_products(maps, weights, proxy, MAPS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``maps``, one after the other, plus the products of COUNT of four channels; the FIRST ones begin the sums."""
    sums = ()
    for m in tl.static_range(MAPS):
        if FIRST:
            b = weights[4 * m] * proxy[0]
        else:
            b = maps[m] + weights[4 * m] * proxy[0]
        for s in tl.static_range(1, COUNT):
            b += weights[4 * m + s] * proxy[s]
        sums = sums + (b,)
    return sums


@triton.jit
def _maps(
    p_line, o_proxy, weights, of, S: tl.constexpr, PIXELS: tl.constexpr, PITCH: tl.constexpr, MAPS: tl.constexpr,
    UNROLL: tl.constexpr, ADJOINT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The maps of a lane's pixels, those of a pixel after those of the other.

    With UNROLL ``weights`` are those of all fours of channels; else they are loaded again.
    """
    FOURS: tl.constexpr = (S + 3) // 4
    maps = ()
    if UNROLL:
        for p in tl.static_range(PIXELS):
            of_pixel = ()
            for i in tl.static_range(FOURS):
                proxy = split_lines(tl.load(p_line + (p * FOURS + i) * 4 * PITCH + o_proxy), 4)
                some = weights[i * 4 * MAPS : (i + 1) * 4 * MAPS]
                of_pixel = _add_products(of_pixel, some, proxy, MAPS, i == 0, 4 if S - 4 * i > 4 else S - 4 * i)
            maps = maps + of_pixel
    else:
        zero = tl.zeros([1, o_proxy.shape[1]], tl.float32)
        for _ in tl.static_range(PIXELS * MAPS):
            maps = maps + (zero,)
        for i in tl.range(0, FOURS):
            some = _weights(of, i, S, ADJOINT, GATED)
            sums = ()
            for p in tl.static_range(PIXELS):
                proxy = split_lines(tl.load(p_line + (p * FOURS + i) * 4 * PITCH + o_proxy), 4)
                sums = sums + _add_products(maps[p * MAPS : (p + 1) * MAPS], some, proxy, MAPS, False, 4)
            maps = sums
    return maps


@triton.jit
def _piece(
    v, i_line, i_low, i_high, m_lane, i_cross, n_cross, i,
    FAST: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, MAY_OVERRUN: tl.constexpr,
):  # fmt: skip
    """Where piece ``i`` of a lane's tile is, and whether it exists: WIDTH pixels of a line, or all lines of a pixel."""
    i_pixel = i if FAST == 2 else i * WIDTH
    m = m_lane
    if MAY_OVERRUN:
        # So may a block of a long row, at its beginning.
        n_there = tl.where(i_line >= i_low, tl.where(i_line < i_high, n_cross, 0), 0)
        m = m & (i_cross + i_pixel >= 0) & (i_cross + i_pixel < n_there)
    elif not WHOLE:
        m = m & (i_cross + i_pixel < n_cross)
    return v.p + v.o + i_pixel * v.s_cross, tl.expand_dims(m, 2)


@triton.jit
def _load(
    v, mine, i_line, i_first, m_lane, i_cross, n_cross,
    FAST: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, WHOLE: tl.constexpr,
    MAY_OVERRUN: tl.constexpr,
):  # fmt: skip
    """A tuple of all pixels of a lane's tile, the lines of a pixel in memory order. Missing ones have any value."""
    v = move(v, i_line, i_first)
    pixels = ()
    for i in tl.static_range(PIXELS * LINES // WIDTH):
        p, m = _piece(v, i_line, mine.i_low, mine.i_high, m_lane, i_cross, n_cross, i, FAST, WIDTH, WHOLE, MAY_OVERRUN)
        pixels = pixels + split_lines(tl.load(p, mask=m), WIDTH)
    return pixels


@triton.jit
def _store(
    v, mine, i_line, i_first, pixels, m_lane, i_cross, n_cross,
    FAST: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, WHOLE: tl.constexpr,
    MAY_OVERRUN: tl.constexpr,
):  # fmt: skip
    """Store what :func:`_load` would load."""
    v = move(v, i_line, i_first)
    for i in tl.static_range(PIXELS * LINES // WIDTH):
        p, m = _piece(v, i_line, mine.i_low, mine.i_high, m_lane, i_cross, n_cross, i, FAST, WIDTH, WHOLE, MAY_OVERRUN)
        b = join_lines(pixels[i * WIDTH : (i + 1) * WIDTH], WIDTH)
        tl.store(p, b.to(v.p.dtype.element_ty), mask=m)


_OF_DIRECTIONS = ["i_direction", "n_per_group", "i_codes", "s_out_direction", "n_images"]


@triton.jit(do_not_specialize=[*integers("in", "out"), "n_chunks", "n_rows", *_OF_DIRECTIONS])
def scan_kernel(
    p_in, s_in_batch, s_in_channel, s_in_cross, s_in_line,
    p_out, s_out_batch, s_out_channel, s_out_cross, s_out_line,
    p_before, p_proxy, p_columns, p_largest, p_taps, p_lam, p_u, p_skip, p_states, p_sizes, i_direction, n_per_group,
    i_codes, s_out_direction, n_images,
    n_groups, n_channels, n_cross, n_lines, n_run, n_runs, n_segment, n_chunks, n_rows,
    FAST: tl.constexpr, ALIGN: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    HALO: tl.constexpr, LINES: tl.constexpr, REVERSE: tl.constexpr, SEGMENTED: tl.constexpr,
    S: tl.constexpr, PITCH: tl.constexpr, UNROLL: tl.constexpr, ADJOINT: tl.constexpr, GATED: tl.constexpr,
    PTX: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A scan of ``gate * in``: its states, or ``out gate * state`` if it is GATED, plus ``skip * in``.

    The sum is added to ``before``, which has the strides of ``out``, if there is one. With ADJOINT the scan runs
    against its direction by the transposed taps, and the gate of what goes in is the other one.

    The projections are those of all directions: ``taps [D, G, 3, S]``, ``lam [D, C, S]``, ``u [D, C, S]``; and
    ``skip [C, S]``. ``largest [4 FOURS]``: the largest absolute value of each channel of the proxy; most logits are
    known to be small.
    ``proxy [B, lines, PIXELS, FOURS, PITCH, 4]``: pixel of a chunk, four channels, chunk, channel of the four.
    A row has ``n_chunks`` chunks, WHOLE if none of them is longer than the row; a group of lanes has ``n_rows`` rows.

    TOGETHER, programs of all directions run side by side, each direction to an ``out`` of its own. Strides and sizes
    are then those of ``"down"``, ``columns`` is the proxy packed for lines along the width, and ``i_codes`` has two
    bits for each direction: whether it is reversed, and whether its lines follow each other along the width.

    ``sizes [B, 2]``: the lines and the cross extent of each image, as strides and sizes are, if images are smaller than
    their maps. The padding of the map is not written to, and that of the proxy is zero.
    """
    FOURS: tl.constexpr = (S + 3) // 4
    MAPS: tl.constexpr = 4 + (1 if GATED else 0) + (0 if p_skip is None else 1)
    n_channels, n_cross, n_lines, n_run = in_elements(n_channels, n_cross, n_lines, n_run, FAST, ALIGN)
    if TOGETHER:
        i_direction = tl.program_id(1)
        i_code = i_codes >> (2 * i_direction) & 3
        m_along_width = i_code >= 2
        s_in_cross, s_in_line = _in_order(m_along_width, s_in_cross.to(tl.int64), s_in_line.to(tl.int64))
        s_out_cross, s_out_line = _in_order(m_along_width, s_out_cross.to(tl.int64), s_out_line.to(tl.int64))
        n_cross, n_lines = _in_order(m_along_width, n_cross, n_lines)
        n_run, n_chunks = n_lines, tl.cdiv(n_cross, PIXELS)
        n_rows = tl.maximum(GROUP // n_chunks, 1)
        p_out += i_direction.to(tl.int64) * s_out_direction
        if m_along_width:
            p_proxy = p_columns
    n_block = LANES // GROUP * n_rows
    mine = share(tl.cdiv(n_channels, n_block), n_groups, n_lines, n_run, n_runs, REVERSE)
    # Where rows of one direction take fewer lanes than those of another, there are programs to spare.
    is_spare = mine.i_batch >= n_images if TOGETHER else False
    if is_spare:
        return
    n_all_lines, n_row = n_lines, n_cross
    if p_sizes is not None:
        i_lines = m_along_width.to(tl.int32) if TOGETHER else 0
        mine, n_lines, n_cross = share_of_image(mine, p_sizes, i_lines, n_lines, n_cross, n_run, REVERSE)

    lane = tl.arange(0, LANES)[None, :]
    i_lane = lane % GROUP
    if FAST == 0:
        i_chunk, i_row, n_away = i_lane // n_rows, i_lane % n_rows, n_rows
        m_lane = i_chunk < n_chunks
    else:
        i_chunk, i_row, n_away = i_lane % n_chunks, i_lane // n_chunks, 1
        m_lane = i_row < n_rows
    if HALO > 0:
        # A row has more chunks than the program lanes: it takes one block of them after the other.
        i_chunk, i_row, n_away = lane, lane * 0, 1
        m_lane = lane >= 0
    i_channel = mine.i_block * n_block + lane // GROUP * n_rows + i_row
    m_lane = m_lane & (i_channel < n_channels)
    # Lanes without work take the last channel's maps.
    i_channel = tl.minimum(i_channel, n_channels - 1)
    i_pixel = i_chunk * PIXELS
    m_kept = m_lane & (lane >= HALO // PIXELS) & (lane < LANES - HALO // PIXELS) if HALO > 0 else m_lane

    w = tl.arange(0, WIDTH)[None, None, :].to(tl.int64)
    zero = tl.full([], 0, tl.int64)
    o_channel, o_pixel = tl.expand_dims(i_channel, 2).to(tl.int64), tl.expand_dims(i_pixel, 2).to(tl.int64)
    o_tile = (o_channel, o_pixel + w if FAST == 1 else o_pixel, w if FAST == 2 else zero)
    s_out = (s_out_batch, s_out_channel, s_out_cross, s_out_line)
    x = view(p_in, mine.i_batch, zero, o_tile, (s_in_batch, s_in_channel, s_in_cross, s_in_line), ALIGN)
    out = view(p_out, mine.i_batch, zero, o_tile, s_out, ALIGN)
    before = out
    if p_before is not None:
        before = view(p_before, mine.i_batch, zero, o_tile, s_out, ALIGN)

    four = tl.arange(0, 4)[None, None, :]
    s_line = PIXELS * FOURS * PITCH * 4
    p_proxy += mine.i_batch * n_all_lines * s_line
    # In 64 bits: rows of weights are counted over all directions.
    o_row = o_channel + i_direction.to(tl.int64) * n_channels
    of = Projections(p_taps, o_row // n_per_group * (3 * S), p_lam, p_u, o_row * S, p_skip, o_channel * S)
    weights = ()
    if UNROLL:
        for i_four in tl.static_range(FOURS):
            weights = weights + _weights(of, i_four, S, ADJOINT, GATED)
    b_bound = tl.zeros([1, LANES], tl.float32)
    bounds = (b_bound, b_bound, b_bound)
    if UNROLL:
        for i_four in tl.static_range(FOURS):
            bounds = _add_bounds(bounds, weights[i_four * 4 * MAPS : (i_four + 1) * 4 * MAPS], p_largest, i_four)
    else:
        for i_more in tl.range(0, FOURS):
            bounds = _add_bounds(bounds, _weights(of, i_more, S, ADJOINT, GATED), p_largest, i_more)
    # Hardly ever: a bound that is a NaN is not below 100 either.
    n_large = tl.sum(tl.where((bounds[0] < 100.0) & (bounds[1] < 100.0) & (bounds[2] < 100.0), 0, 1))

    b_states = ()
    for _ in tl.static_range(PIXELS):
        b_states = b_states + (tl.zeros([1, LANES], tl.float32),)
    BLOCK: tl.constexpr = LANES * PIXELS
    TILES: tl.constexpr = HALO // LINES if HALO > 0 else 1
    MAY_OVERRUN: tl.constexpr = HALO > 0
    n_visits = tl.cdiv(n_cross, BLOCK - 2 * HALO) * TILES if HALO > 0 else TILES
    if HALO > 0:
        between = states(p_states, 0, i_pixel, n_row, 1, FAST)
    n_rounds = tl.cdiv(mine.i_high - mine.i_low, TILES * LINES)

    for i_round in tl.range(0, n_rounds, num_stages=1):
        for i_visit in tl.range(0, n_visits, num_stages=1):
            i_step, i_line, i_first = tile(
                i_round, i_visit, n_rounds, mine, n_lines, BLOCK, HALO, LINES, TILES, ADJOINT, REVERSE
            )
            if TOGETHER:
                i_line = tl.where((i_code & 1) != 0, n_lines - 1 - i_step, i_step)
            i_cross = i_first + i_pixel if HALO > 0 else i_pixel
            b_in = _load(
                x, mine, i_line, i_first, m_lane, i_cross, n_cross, FAST, PIXELS, WIDTH, LINES, WHOLE, MAY_OVERRUN
            )
            b_added = b_in
            if p_before is not None:
                b_added = _load(
                    before, mine, i_line, i_first, m_kept, i_cross, n_cross,
                    FAST, PIXELS, WIDTH, LINES, WHOLE, MAY_OVERRUN,
                )  # fmt: skip
            i_proxy = i_chunk
            if HALO > 0:
                # Beyond the ends of a row there is no proxy; any will do.
                i_proxy = tl.minimum(tl.maximum(i_first // PIXELS + i_chunk, 0), n_chunks - 1)
                b_left_there = b_states
                b_states = ()
                for p in tl.static_range(PIXELS):
                    there = States(between.p + p, between.o)
                    b_states = b_states + (
                        load_state(
                            b_left_there[p], there, i_round, i_visit, i_first, i_cross + p, n_row, 1, TILES, FAST
                        ),
                    )
            o_proxy = tl.expand_dims(tl.minimum(i_proxy, n_chunks - 1), 2) * 4 + four

            b_out = ()
            # Numbered in the order of the scan, which an adjoint takes backwards.
            for i in tl.static_range(LINES - 1 if ADJOINT else 0, -1 if ADJOINT else LINES, -1 if ADJOINT else 1):
                i_here = i_line + (LINES - 1 - i if REVERSE else i)
                m_follows = (i_step + i) % n_segment != 0 if SEGMENTED else i_step + i != 0
                if MAY_OVERRUN:
                    # Lines beyond the program's, which are the first of an adjoint, carry nothing on.
                    m_follows = m_follows & (i_here >= mine.i_low) & (i_here < mine.i_high)
                    i_here = tl.minimum(tl.maximum(i_here, 0), n_lines - 1)
                maps = _maps(
                    p_proxy + i_here.to(tl.int64) * s_line, o_proxy, weights, of,
                    S, PIXELS, PITCH, MAPS, UNROLL, ADJOINT, GATED,
                )  # fmt: skip
                logits = ()
                for p in tl.static_range(PIXELS):
                    b_before, b_after = maps[p * MAPS], maps[p * MAPS + 2]
                    if p == 0:
                        b_before = tl.where(i_cross > 0, b_before, float("inf"))
                    if not WHOLE or p == PIXELS - 1:
                        b_after = tl.where(i_cross + p < n_cross - 1, b_after, float("inf"))
                    logits = logits + (b_before, maps[p * MAPS + 1], b_after)
                if n_large > 0:
                    logits = within_reach(logits, i_cross, n_cross, PIXELS)
                taps = ()
                for p in tl.static_range(PIXELS):
                    taps = taps + stochastic(logits[3 * p], logits[3 * p + 1], logits[3 * p + 2], PTX)
                # From where no neighbour is, values are left out by a select: they may be anything.
                b_new, b_carries = (), ()
                if ADJOINT:
                    b_here = ()
                    for p in tl.static_range(PIXELS):
                        b_here = b_here + (
                            maps[p * MAPS + 3] * b_in[p * LINES + (LINES - 1 - i if REVERSE else i)].to(tl.float32)
                            + b_states[p],
                        )
                    b_left, b_right = chunk_neighbours(
                        taps[3 * PIXELS - 1] * b_here[PIXELS - 1], taps[0] * b_here[0], n_away, GROUP
                    )
                    for p in tl.static_range(PIXELS):
                        b = taps[3 * p + 1] * b_here[p]
                        if p == 0:
                            b += tl.where(i_cross > 0, b_left, 0.0)
                        else:
                            b += taps[3 * p - 1] * b_here[p - 1]
                        if p == PIXELS - 1:
                            b += tl.where(i_cross + p < n_cross - 1, b_right, 0.0)
                        elif WHOLE:
                            b += taps[3 * p + 3] * b_here[p + 1]
                        else:
                            b += tl.where(i_cross + p < n_cross - 1, taps[3 * p + 3] * b_here[p + 1], 0.0)
                        b_carries = b_carries + (tl.where(m_follows, b, 0.0),)
                    b_new, b_states = b_here, b_carries
                else:
                    b_left, b_right = chunk_neighbours(b_states[PIXELS - 1], b_states[0], n_away, GROUP)
                    for p in tl.static_range(PIXELS):
                        b = taps[3 * p + 1] * b_states[p]
                        if p == 0:
                            b += taps[0] * tl.where(i_cross > 0, b_left, 0.0)
                        else:
                            b += taps[3 * p] * b_states[p - 1]
                        if p == PIXELS - 1:
                            b += taps[3 * p + 2] * tl.where(i_cross + p < n_cross - 1, b_right, 0.0)
                        elif WHOLE:
                            b += taps[3 * p + 2] * b_states[p + 1]
                        else:
                            b += taps[3 * p + 2] * tl.where(i_cross + p < n_cross - 1, b_states[p + 1], 0.0)
                        b = tl.where(m_follows, b, 0.0)
                        b_new = b_new + (
                            maps[p * MAPS + 3] * b_in[p * LINES + (LINES - 1 - i if REVERSE else i)].to(tl.float32) + b,
                        )
                    b_states = b_new
                b_line = ()
                for p in tl.static_range(PIXELS):
                    b = b_new[p]
                    if GATED:
                        b = _rounded_product(maps[p * MAPS + 4], b, PTX)
                    if p_skip is not None:
                        b_skip = b + maps[p * MAPS + MAPS - 1] * b_in[p * LINES + (LINES - 1 - i if REVERSE else i)].to(
                            tl.float32
                        )
                        b = tl.where(i_direction == 0, b_skip, b) if TOGETHER else b_skip
                    if p_before is not None:
                        b += b_added[p * LINES + (LINES - 1 - i if REVERSE else i)].to(tl.float32)
                    b_line = b_line + (b,)
                # By pixel, and within each by line in memory.
                b_so_far, b_out = b_out, ()
                for p in tl.static_range(PIXELS):
                    earlier = b_so_far[
                        p * (LINES - 1 - i if ADJOINT else i) : (p + 1) * (LINES - 1 - i if ADJOINT else i)
                    ]
                    if ADJOINT != REVERSE:
                        b_out = b_out + (b_line[p],) + earlier
                    else:
                        b_out = b_out + earlier + (b_line[p],)
            _store(
                out, mine, i_line, i_first, b_out, m_kept, i_cross, n_cross,
                FAST, PIXELS, WIDTH, LINES, WHOLE, MAY_OVERRUN,
            )  # fmt: skip
            if HALO > 0:
                for p in tl.static_range(PIXELS):
                    there = States(between.p + p, between.o)
                    store_state(
                        b_states[p], there, i_round, i_visit, i_first, i_cross + p, n_row, m_kept, 1, TILES, FAST
                    )
        if HALO > 0:
            # The next round's states come from other threads.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["n"])
def sum_kernel(p_parts, p_out, n, D: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` of ``n`` elements, the sum of D parts in their order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    b = tl.load(p_parts + i, mask=m)
    for d in tl.static_range(1, D):
        b += tl.load(p_parts + d * n + i, mask=m)
    tl.store(p_out + i, b.to(p_out.dtype.element_ty), mask=m)
