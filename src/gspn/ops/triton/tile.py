"""The recurrence and its adjoint on one tile of consecutive lines, held in registers.

A tile is ``[channels, cross, lines]`` with its lines in memory order; REVERSE says that the scan takes them from the last.
It is stored in groups of GROUP lines, as wide as one thread's store, so that no state waits in a register for the others.
Products with neighbours that do not exist are left out by a select, never multiplied by zero: the tap concerned may hold
anything, NaN included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exchange import join_lines, neighbour_pairs, neighbours, split_lines


@triton.jit
def place(channel, cross, line, channel_stride, cross_stride, line_stride, FAST: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets into a tensor whose stride along axis FAST of the tile (0, 1 or 2; 3: none of them) is 1.

    The other strides count ALIGN elements: this is how the compiler learns what they are divisible by, for any size and
    not only for multiples of 16.
    """
    at_channel = channel if FAST == 0 else channel * (channel_stride * ALIGN)
    at_cross = cross if FAST == 1 else cross * (cross_stride * ALIGN)
    at_line = line if FAST == 2 else line * (line_stride * ALIGN)
    return at_channel + at_cross + at_line


@triton.jit
def _scan_order(lines, LINES: tl.constexpr, REVERSE: tl.constexpr):
    """A tuple of lines from memory order to the order of the scan, or back."""
    if REVERSE:
        turned = ()
        for i in tl.static_range(LINES):
            turned = (lines[i],) + turned
        return turned
    else:
        return lines


@triton.jit
def _lines(tile, LINES: tl.constexpr, REVERSE: tl.constexpr):
    return _scan_order(split_lines(tile, LINES), LINES, REVERSE)


@triton.jit
def _store(pointers, lines, inside, line, low, high, GROUP: tl.constexpr, REVERSE: tl.constexpr, MASK: tl.constexpr):
    """Store GROUP lines, a tuple in scan order; ``line`` is the first of them in memory, ``[low, high)`` what may be written."""
    if MASK:
        t = line + tl.arange(0, GROUP)[None, None, :]
        inside = inside & (t >= low) & (t < high)
    tile = join_lines(_scan_order(lines, GROUP, REVERSE), GROUP)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def scan_tile(
    x, lam, before, here, after,
    h_at, h_line,
    state, inside, has_left, has_right,
    line, low, high, step, phase, segment,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, HAS_LAM: tl.constexpr,
):  # fmt: skip
    """Advance the scan by a tile, storing its states; returns the last of them and the phase of the line after it.

    ``step`` counts the lines scanned before the tile; ``phase`` is the place of the tile's first line in its segment.
    """
    xs = _lines(x, LINES, REVERSE)
    befores, heres, afters = _lines(before, LINES, REVERSE), _lines(here, LINES, REVERSE), _lines(after, LINES, REVERSE)
    if HAS_LAM:
        lams = _lines(lam, LINES, REVERSE)
    for g in tl.static_range(LINES // GROUP):
        scanned = ()
        for i in tl.static_range(g * GROUP, g * GROUP + GROUP):
            left, right = neighbours(state, state, VECTOR)
            carried = heres[i].to(tl.float32) * state
            carried += tl.where(has_left, befores[i].to(tl.float32) * left, 0.0)
            carried += tl.where(has_right, afters[i].to(tl.float32) * right, 0.0)
            if SEGMENTED:
                carried = tl.where(phase != 0, carried, 0.0)
                phase = tl.where(phase + 1 == segment, 0, phase + 1)
            else:
                carried = tl.where(step + i != 0, carried, 0.0)
            state = xs[i].to(tl.float32)
            if HAS_LAM:
                state *= lams[i].to(tl.float32)
            state += carried
            scanned = scanned + (state,)
        first = LINES - GROUP - g * GROUP if REVERSE else g * GROUP
        _store(h_at + first * h_line, scanned, inside, line + first, low, high, GROUP, REVERSE, LINES > 1)
    return state, phase


@triton.jit
def adjoint_tile(
    grad, h, h_edge, x, lam, before, here, after,
    dx_at, dx_line, dlam_at, dlam_line, dtaps_at, dtaps_line, dtaps_tap,
    carried, valid, inside, taps_inside, has_left, has_right,
    line, low, high, step, phase, segment,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr,
    HAS_LAM: tl.constexpr, NEED_TAPS: tl.constexpr, NEED_LAM: tl.constexpr, SAME_LINES: tl.constexpr,
):  # fmt: skip
    """Advance the adjoint scan by a tile, last line first, storing the gradients of its lines.

    ``carried`` is what the lines after the tile send to its last line. The states ``h`` are those of the lines before
    each line of the tile; with SAME_LINES those of the tile's own lines, ``h_edge`` that of the line before them.
    ``phase`` is the place of the tile's last line in its segment. Returns what the tile sends on, and the phase before it.
    """
    grads = _lines(grad, LINES, REVERSE)
    befores, heres, afters = _lines(before, LINES, REVERSE), _lines(here, LINES, REVERSE), _lines(after, LINES, REVERSE)
    if HAS_LAM:
        lams = _lines(lam, LINES, REVERSE)
    if NEED_LAM:
        xs = _lines(x, LINES, REVERSE)
    if NEED_TAPS:
        hs = _lines(h, LINES, REVERSE)
        if SAME_LINES:
            hs = (h_edge,) + hs[0 : LINES - 1]
    for g in tl.static_range(LINES // GROUP):
        dxs, dlams, dbefores, dheres, dafters = (), (), (), (), ()
        for k in tl.static_range(g * GROUP, g * GROUP + GROUP):
            adjoint = grads[LINES - 1 - k].to(tl.float32) + carried
            if SHARED:
                # A channel beyond the last has no part in the sum of its group, even if a tap is infinite.
                adjoint = tl.where(valid, adjoint, 0.0)
            dx = adjoint
            if HAS_LAM:
                dx = lams[LINES - 1 - k].to(tl.float32) * adjoint
            dxs = (dx,) + dxs
            if NEED_LAM:
                dlams = (xs[LINES - 1 - k].to(tl.float32) * adjoint,) + dlams
            if SEGMENTED:
                follows = phase != 0
                phase = tl.where(phase == 0, segment - 1, phase - 1)
            else:
                follows = step + (LINES - 1 - k) != 0
            to_left = befores[LINES - 1 - k].to(tl.float32) * adjoint
            to_right = afters[LINES - 1 - k].to(tl.float32) * adjoint
            if NEED_TAPS:
                state = hs[LINES - 1 - k].to(tl.float32)
                from_left, from_right, left, right = neighbour_pairs(to_right, to_left, state, VECTOR)
                dbefore = tl.where(has_left & follows, adjoint * left, 0.0)
                dhere = tl.where(follows, adjoint * state, 0.0)
                dafter = tl.where(has_right & follows, adjoint * right, 0.0)
                if SHARED:
                    dbefore = tl.sum(dbefore, axis=0, keep_dims=True)
                    dhere = tl.sum(dhere, axis=0, keep_dims=True)
                    dafter = tl.sum(dafter, axis=0, keep_dims=True)
                dbefores = (dbefore,) + dbefores
                dheres = (dhere,) + dheres
                dafters = (dafter,) + dafters
            else:
                from_left, from_right = neighbours(to_right, to_left, VECTOR)
            carried = heres[LINES - 1 - k].to(tl.float32) * adjoint
            carried += tl.where(has_left, from_left, 0.0) + tl.where(has_right, from_right, 0.0)
            carried = tl.where(follows, carried, 0.0)
        first = g * GROUP if REVERSE else LINES - GROUP - g * GROUP
        now = line + first
        _store(dx_at + first * dx_line, dxs, inside, now, low, high, GROUP, REVERSE, LINES > 1)
        if NEED_LAM:
            _store(dlam_at + first * dlam_line, dlams, inside, now, low, high, GROUP, REVERSE, LINES > 1)
        if NEED_TAPS:
            at = dtaps_at + first * dtaps_line
            _store(at, dbefores, taps_inside, now, low, high, GROUP, REVERSE, LINES > 1)
            _store(at + dtaps_tap, dheres, taps_inside, now, low, high, GROUP, REVERSE, LINES > 1)
            _store(at + 2 * dtaps_tap, dafters, taps_inside, now, low, high, GROUP, REVERSE, LINES > 1)
    return carried, phase
