"""The scans of ``propagate`` with maps by tensor cores, in Gluon: rows of at most 128 pixels.

Gluon is Triton with the layouts of all tensors said, so that it is known which thread holds what. A warp takes eight
channels of an image through a run of lines, in tiles of eight pixels, and nothing ever leaves it.

**Lanes.** Lane ``4 c + t`` has pixels ``2 t`` and ``2 t + 1`` of every tile of channel ``c``, which is how tensor cores
give a product of 16 rows and eight columns: the lane's two columns of row ``c`` and of row ``c + 8``. The rows are two
maps of eight channels, the columns the pixels, and what is summed over is the proxy's channels. States and maps stay
in the registers of their lane; a shuffle brings the neighbour on each side from the lane beside it: its state, or in an
adjoint scan what it hands on.

**Maps.** A float32 is the sum of two TF32 numbers, see :mod:`.tf32`. A projection is split when it is loaded, and the
proxy has been when it was packed, as the lanes read it: in fours of channels, of which lane ``4 p + t`` holds number
``t`` at pixel ``p``. A matrix product sums over two fours, of any parts.

The prefixes of names and views are explained in :mod:`.addressing`; the constexpr arguments are what :mod:`.planner`
chooses. Tensors are ``[1, LANES]``, and ``[1, LANES, N]`` where a lane loads N numbers at once. Instructions that all
lanes execute together are not called pure, lest the compiler move them to where only some lanes come.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .addressing import in_elements, integers, move, share, view
from .neighbour_shuffle import join_lines, split_lines
from .taps import stochastic, within_reach
from .tf32 import pair


@gluon.jit
def _shuffled(b, i_lane):
    """The value of lane ``i_lane`` of the warp."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [b, i_lane], gl.float32, False, 1
    )


@gluon.jit
def _add_product(c, a, b):
    """``c`` plus a product of eight numbers of 16 rows and of eight columns, as lanes hold them."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
        (gl.float32, gl.float32, gl.float32, gl.float32), False, 1,
    )  # fmt: skip


@gluon.jit
def _of_lanes(b, N: gl.constexpr):
    """``[1, LANES]`` to ``[1, LANES, 1]``, beside which a lane holds N numbers."""
    WARPS: gl.constexpr = b.shape[1] // 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, N], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    return gl.expand_dims(gl.convert_layout(b, gl.SliceLayout(2, LAYOUT), assert_trivial=True), 2)


@gluon.jit
def _numbers(N: gl.constexpr, WARPS: gl.constexpr):
    """``[1, 1, N]``: 0 to N - 1."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, N], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    i = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return gl.expand_dims(gl.expand_dims(i, 0), 1)


@gluon.jit
def _one_by_one(b, LAYOUT: gl.constexpr):
    """The numbers that each lane has loaded."""
    N: gl.constexpr = b.shape[2]
    numbers = split_lines(b, N)
    one_by_one = ()
    for i in gl.static_range(N):
        one_by_one = one_by_one + (gl.convert_layout(numbers[i], LAYOUT, assert_trivial=True),)
    return one_by_one


@gluon.jit
def _weights(p, o, i_four, SCALE: gl.constexpr, S: gl.constexpr):
    """A lane's numbers of a row of S, times SCALE: the high parts of each four, then the low ones."""
    highs, lows = (), ()
    for q in gl.static_range((S + 3) // 4):
        i = 4 * q + i_four
        b_high, b_low = pair(gl.load(p + (o + i), mask=i < S, other=0.0) * SCALE, True)
        highs = highs + (b_high,)
        lows = lows + (b_low,)
    return highs + lows


@gluon.jit
def _add_products(maps, upper, lower, proxy, b_zero):
    """``maps`` plus the products of these fours of two projections and of the proxy."""
    FOURS: gl.constexpr = len(proxy)
    for q in gl.static_range(0, FOURS, 2):
        if q + 1 < FOURS:
            a = (upper[q], lower[q], upper[q + 1], lower[q + 1])
            maps = _add_product(maps, a, (proxy[q], proxy[q + 1]))
        else:
            maps = _add_product(maps, (upper[q], lower[q], b_zero, b_zero), (proxy[q], b_zero))
    return maps


@gluon.jit
def _two_maps(upper, lower, proxy, b_zero, FOURS: gl.constexpr, LARGE: gl.constexpr):
    """Two maps at a lane's pixels: both numbers of the first, then both of the second."""
    LOWS: gl.constexpr = len(proxy) - FOURS
    zeros = (b_zero, b_zero, b_zero, b_zero)
    # The products of high parts come last: they are the largest.
    maps = _add_products(
        zeros, upper[FOURS:] + upper[:LOWS] + upper[:FOURS], lower[FOURS:] + lower[:LOWS] + lower[:FOURS],
        proxy[:FOURS] + proxy[FOURS:] + proxy[:FOURS], b_zero,
    )  # fmt: skip
    if LARGE:
        # Where a map is beyond the largest number, so may what the low parts add be, with another sign.
        highs = _add_products(zeros, upper[:FOURS], lower[:FOURS], proxy[:FOURS], b_zero)
        within = ()
        for k in gl.static_range(4):
            within = within + (gl.where(gl.abs(maps[k]) < float("inf"), maps[k], highs[k]),)
        return within
    else:
        return maps


class _Lanes(NamedTuple):
    """All that a lane knows of its channel and pixels."""

    lane: Any
    """Its number in the warp."""
    i_pixel: Any
    """Its first pixel."""
    m_lane: Any
    """Whether its channel exists."""
    m_last: Any
    """Whether what it loads of the last tile exists, and if it loads twice, the second."""
    weights: Any
    """The numbers of its channel's projections: of three taps, the gate of what goes in, u and skip."""
    p_proxy: Any
    o_proxy: Any


@gluon.jit
def _load(v, j, mine, TILES: gl.constexpr, LOADS: gl.constexpr, LAYOUT: gl.constexpr):
    """A lane's two pixels of tile ``j``, each with its lines in memory order. Those beyond a row have any value."""
    pixels = ()
    for i in gl.static_range(LOADS):
        p = v.p + (8 * j + i) * v.s_cross + v.o
        if j == TILES - 1:
            pixels = pixels + _one_by_one(gl.load(p, mask=mine.m_last[i]), LAYOUT)
        else:
            pixels = pixels + _one_by_one(gl.load(p), LAYOUT)
    return pixels


@gluon.jit
def _store(v, j, pixels, mine, TILES: gl.constexpr, LOADS: gl.constexpr):
    """Store what :func:`_load` would load."""
    N: gl.constexpr = len(pixels) // LOADS
    for i in gl.static_range(LOADS):
        p = v.p + (8 * j + i) * v.s_cross + v.o
        b = gl.convert_layout(join_lines(pixels[i * N : (i + 1) * N], N), v.o.type.layout, assert_trivial=True)
        gl.store(p, b.to(v.p.dtype.element_ty), mask=mine.m_last[i] if j == TILES - 1 else mine.m_lane)


@gluon.jit
def _where(m, states):
    """The states, or zeros."""
    b_states = ()
    for k in gl.static_range(len(states)):
        b_states = b_states + (gl.where(m, states[k], 0.0),)
    return b_states


@gluon.jit
def _beside(lane, b_last, b_first, b_second, b_next):
    """The values of the pixels before and after a lane's two pixels, which have ``first`` and ``second``.

    ``last`` is the value of second pixels in the tile before, ``next`` that of first pixels in the tile after it.
    """
    b_before = _shuffled(gl.where((lane & 3) == 3, b_last, b_second), (lane & 28) + ((lane + 3) & 3))
    b_after = _shuffled(gl.where((lane & 3) == 0, b_next, b_first), (lane & 28) + ((lane + 1) & 3))
    return b_before, b_after


@gluon.jit
def _handed_on(lane, b_kept, b_back, b_ahead, j, TILES: gl.constexpr, b_zero):
    """The sums that an adjoint scan carries on at a lane's two pixels of tile ``j``.

    ``kept``: what both hand to themselves and each other; ``back`` and ``ahead``: what the first hands to the pixel
    before it, and the second to the one after it. The ends of a row hand nothing beyond it.
    """
    b_last = b_ahead[j - 1] if j > 0 else b_zero
    b_next = b_back[j + 1] if j < TILES - 1 else b_zero
    b_before, b_after = _beside(lane, b_last, b_back[j], b_ahead[j], b_next)
    return b_kept[2 * j] + b_before, b_kept[2 * j + 1] + b_after


@gluon.jit
def _scan(
    x, out, before, share, mine, n_lines, n_cross, n_segment,
    TILES: gl.constexpr, LOADS: gl.constexpr, LINES: gl.constexpr, REVERSE: gl.constexpr, SEGMENTED: gl.constexpr,
    FOURS: gl.constexpr, ADJOINT: gl.constexpr, GATED: gl.constexpr, SKIP: gl.constexpr, LAYOUT: gl.constexpr,
    LARGE: gl.constexpr,
):  # fmt: skip
    """All lines of a program. With LARGE the logits may have any size."""
    PIXELS: gl.constexpr = 2 * TILES
    lane, weights = mine.lane, mine.weights
    b_zero = gl.full([1, lane.shape[1]], 0.0, gl.float32, LAYOUT)
    m_first = (lane & 3) == 0
    s_tile = 32 * mine.o_proxy.shape[2]
    b_states = ()
    for _ in gl.static_range(PIXELS):
        b_states = b_states + (b_zero,)
    n_rounds = gl.cdiv(share.i_high - share.i_low, LINES)
    for i_round in range(n_rounds):
        i_step = (n_rounds - 1 - i_round if ADJOINT else i_round) * LINES
        i_line = n_lines - share.i_start - i_step - LINES if REVERSE else share.i_start + i_step
        x_here, out_here = move(x, i_line, i_line * 0), move(out, i_line, i_line * 0)
        b_in, b_added, b_out = (), (), ()
        for j in gl.static_range(TILES):
            b_in = b_in + _load(x_here, j, mine, TILES, LOADS, LAYOUT)
        # Numbered in the order of the scan, which an adjoint takes backwards.
        for i in gl.static_range(LINES - 1 if ADJOINT else 0, -1 if ADJOINT else LINES, -1 if ADJOINT else 1):
            p_line = mine.p_proxy + (i_line + (LINES - 1 - i if REVERSE else i)).to(gl.int64) * (TILES * s_tile)
            if SEGMENTED and not ADJOINT:
                b_states = _where((i_step + i) % n_segment != 0, b_states)
            if before is not None and i == LINES - 1:
                # Not earlier: it takes registers.
                before_here = move(before, i_line, i_line * 0)
                for j in gl.static_range(TILES):
                    b_added = b_added + _load(before_here, j, mine, TILES, LOADS, LAYOUT)
            b_new, b_kept, b_back, b_ahead = (), (), (), ()
            for j in gl.static_range(TILES):
                i_cross = mine.i_pixel + 8 * j
                proxy = _one_by_one(gl.load(p_line + j * s_tile + mine.o_proxy), LAYOUT)
                first = _two_maps(weights[0], weights[1], proxy, b_zero, FOURS, LARGE)
                second = _two_maps(weights[2], weights[3], proxy, b_zero, FOURS, LARGE)
                if GATED:
                    third = _two_maps(weights[4], weights[5], proxy, b_zero, FOURS, LARGE)
                logits = (first[0], first[2], second[0], first[1], first[3], second[1])
                if j == 0:
                    logits = (gl.where(m_first, float("inf"), logits[0]),) + logits[1:]
                if j == TILES - 1:
                    b_after_0 = gl.where(i_cross < n_cross - 1, logits[2], float("inf"))
                    b_after_1 = gl.where(i_cross + 1 < n_cross - 1, logits[5], float("inf"))
                    logits = logits[:2] + (b_after_0,) + logits[3:5] + (b_after_1,)
                if LARGE:
                    logits = within_reach(logits, i_cross, n_cross, 2)
                of_0 = stochastic(logits[0], logits[1], logits[2], True)
                of_1 = stochastic(logits[3], logits[4], logits[5], True)
                b_0, b_1 = b_states[2 * j], b_states[2 * j + 1]
                if ADJOINT:
                    b_0_new, b_1_new = b_0, b_1
                else:
                    b_last = b_states[2 * j - 1] if j > 0 else b_zero
                    b_next = b_states[2 * j + 2] if j < TILES - 1 else b_zero
                    b_before, b_after = _beside(lane, b_last, b_0, b_1, b_next)
                    b_0_new = of_0[0] * b_before + of_0[1] * b_0 + of_0[2] * b_1
                    b_1_new = of_1[0] * b_0 + of_1[1] * b_1 + of_1[2] * b_after
                x_0 = b_in[2 * j * LINES + (LINES - 1 - i if REVERSE else i)].to(gl.float32)
                x_1 = b_in[(2 * j + 1) * LINES + (LINES - 1 - i if REVERSE else i)].to(gl.float32)
                b_0_new += second[2] * x_0
                b_1_new += second[3] * x_1
                if j == TILES - 1:
                    # Beyond the row there is no state, whatever has been loaded.
                    b_0_new = gl.where(i_cross < n_cross, b_0_new, 0.0)
                    b_1_new = gl.where(i_cross + 1 < n_cross, b_1_new, 0.0)
                if ADJOINT:
                    b_kept = b_kept + (of_0[1] * b_0_new + of_1[0] * b_1_new, of_0[2] * b_0_new + of_1[1] * b_1_new)
                    b_back, b_ahead = b_back + (of_0[0] * b_0_new,), b_ahead + (of_1[2] * b_1_new,)
                    if j > 0:
                        b_new = b_new + _handed_on(lane, b_kept, b_back, b_ahead, j - 1, TILES, b_zero)
                else:
                    b_new = b_new + (b_0_new, b_1_new)
                y_0, y_1 = b_0_new, b_1_new
                if GATED:
                    y_0, y_1 = third[0] * b_0_new, third[1] * b_1_new
                if SKIP:
                    y_0 += third[2] * x_0
                    y_1 += third[3] * x_1
                b_out = b_out + (y_0, y_1)
                if i == (0 if ADJOINT else LINES - 1):
                    pixels = ()
                    for k in gl.static_range(2):
                        for n in gl.static_range(LINES):
                            b = b_out[(LINES - 1 - n if REVERSE != ADJOINT else n) * PIXELS + 2 * j + k]
                            if before is not None:
                                b += b_added[(2 * j + k) * LINES + n].to(gl.float32)
                            pixels = pixels + (b,)
                    _store(out_here, j, pixels, mine, TILES, LOADS)
            if ADJOINT:
                b_new = b_new + _handed_on(lane, b_kept, b_back, b_ahead, TILES - 1, TILES, b_zero)
                if SEGMENTED:
                    b_new = _where((i_step + i) % n_segment != 0, b_new)
            b_states = b_new


@gluon.jit(do_not_specialize=[*integers("in", "out"), "i_direction", "n_per_group"])
def warp_scan_kernel(
    p_in, s_in_batch, s_in_channel, s_in_cross, s_in_line,
    p_out, s_out_batch, s_out_channel, s_out_cross, s_out_line,
    p_before, p_proxy, p_largest, p_taps, p_lam, p_u, p_skip, i_direction, n_per_group,
    n_groups, n_channels, n_cross, n_lines, n_run, n_runs, n_segment,
    FAST: gl.constexpr, ALIGN: gl.constexpr, HALO: gl.constexpr, LINES: gl.constexpr, REVERSE: gl.constexpr,
    SEGMENTED: gl.constexpr, WARPS: gl.constexpr, TILES: gl.constexpr, WIDTH: gl.constexpr, S: gl.constexpr,
    PARTS: gl.constexpr, ADJOINT: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The states of a scan of ``lam * in``; if GATED ``u`` times them, plus ``skip * in``, if there is a skip.

    The sum is added to ``before``, if there is one. With ADJOINT the scan runs against its direction by the transposed
    taps, and ``u`` is the gate of what goes in. Arguments are those of :func:`.scan_kernels.scan_kernel`, but ``proxy
    [B, lines, 8 TILES, 4, PARTS]``: a pixel and a channel of four, and of each four the number, or of float32 the two
    TF32 numbers whose sum it is.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    FOURS: gl.constexpr = (S + 3) // 4
    gl.static_assert(HALO == 0)
    NUMBERS: gl.constexpr = LINES if FAST == 2 else WIDTH  # that a lane loads at once
    n_channels, n_cross, n_lines, n_run = in_elements(n_channels, n_cross, n_lines, n_run, FAST, ALIGN)
    of_program = share(gl.cdiv(n_channels, 8 * WARPS), n_groups, n_lines, n_run, n_runs, REVERSE)
    thread = gl.expand_dims(gl.arange(0, 32 * WARPS, gl.SliceLayout(0, LAYOUT)), 0)
    lane = thread % 32
    i_four, i_pixel = lane % 4, lane % 4 * 2
    i_channel = of_program.i_block * (8 * WARPS) + thread // 32 * 8 + lane // 4
    m_channel = i_channel < n_channels
    # Lanes without work take the last channel's pixels.
    i_channel = gl.minimum(i_channel, n_channels - 1).to(gl.int64)

    o_row = i_channel + i_direction.to(gl.int64) * n_channels
    weights, bounds = (), ()
    for k in gl.static_range(3):
        of_tap = _weights(p_taps + k * S, o_row // n_per_group * (3 * S), i_four, -1.4426950408889634, S)
        weights = weights + (of_tap,)
        b_bound = gl.full([1, 32 * WARPS], 0.0, gl.float32, LAYOUT)
        for q in gl.static_range(FOURS):
            b_bound += gl.abs(of_tap[q]) * gl.load(p_largest + (4 * q + i_four))
        # The sum over the channel's four lanes.
        b_bound += _shuffled(b_bound, lane ^ 1)
        bounds = bounds + (b_bound + _shuffled(b_bound, lane ^ 2),)
    weights = weights + (_weights(p_u if ADJOINT else p_lam, o_row * S, i_four, 1.0, S),)
    if GATED:
        weights = weights + (_weights(p_u, o_row * S, i_four, 1.0, S),)
        if p_skip is None:
            weights = weights + (_weights(p_u, o_row * S, i_four, 0.0, S),)
        else:
            weights = weights + (_weights(p_skip, i_channel * S, i_four, 1.0, S),)

    n = _numbers(NUMBERS, WARPS)
    i_channels, i_pixels = _of_lanes(i_channel, NUMBERS), _of_lanes(i_pixel, NUMBERS)
    i_first = i_pixels + n if FAST == 1 else i_pixels + n * 0
    o_tile = (i_channels, i_first.to(gl.int64), n.to(gl.int64) if FAST == 2 else n.to(gl.int64) * 0)
    s_out = (s_out_batch, s_out_channel, s_out_cross, s_out_line)
    i_none = of_program.i_batch * 0
    x = view(p_in, of_program.i_batch, i_none, o_tile, (s_in_batch, s_in_channel, s_in_cross, s_in_line), ALIGN)
    out = view(p_out, of_program.i_batch, i_none, o_tile, s_out, ALIGN)
    before = None
    if p_before is not None:
        before = view(p_before, of_program.i_batch, i_none, o_tile, s_out, ALIGN)
    m_lane = _of_lanes(m_channel, NUMBERS)
    i_last = i_first + 8 * (TILES - 1)
    mine = _Lanes(
        lane, i_pixel, m_lane, (m_lane & (i_last < n_cross), m_lane & (i_last + 1 < n_cross)), weights,
        p_proxy + of_program.i_batch * n_lines * (TILES * 32 * PARTS),
        _of_lanes(lane * PARTS, PARTS) + _numbers(PARTS, WARPS),
    )  # fmt: skip
    # Hardly ever: a bound that is a NaN is not below 100 either.
    m_small = (bounds[0] < 100.0) & (bounds[1] < 100.0) & (bounds[2] < 100.0)
    if gl.min(gl.min(m_small.to(gl.int32), 1), 0) == 0:
        _scan(
            x, out, before, of_program, mine, n_lines, n_cross, n_segment, TILES, 2 // WIDTH, LINES, REVERSE, SEGMENTED,
            FOURS, ADJOINT, GATED, p_skip is not None, LAYOUT, True,
        )  # fmt: skip
    else:
        _scan(
            x, out, before, of_program, mine, n_lines, n_cross, n_segment, TILES, 2 // WIDTH, LINES, REVERSE, SEGMENTED,
            FOURS, ADJOINT, GATED, p_skip is not None, LAYOUT, False,
        )  # fmt: skip
