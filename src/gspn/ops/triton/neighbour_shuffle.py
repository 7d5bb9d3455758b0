"""Moving values between the threads of a program: lines of a tile into registers and back, and a line's neighbours.

A tile is ``[channels, cross, lines]``, a state ``[channels, cross]``. What keeps a scan fast is that none of this moves
data where a thread already holds it: ``split_lines`` and ``join_lines`` rename registers when a thread owns the lines
of its pixels, and ``neighbours`` sends one value per thread and side through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_lines(tile, LINES: tl.constexpr):
    """``[C, N, LINES]`` to a tuple of LINES ``[C, N]``, in order."""
    if LINES == 1:
        return (tl.reshape(tile, [tile.shape[0], tile.shape[1]]),)
    elif LINES == 2:
        return tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], LINES // 2, 2]))
        evens = split_lines(even, LINES // 2)
        odds = split_lines(odd, LINES // 2)
        lines = ()
        for i in tl.static_range(LINES // 2):
            lines = lines + (evens[i], odds[i])
        return lines


@triton.jit
def join_lines(lines, LINES: tl.constexpr):
    """The inverse of :func:`split_lines`."""
    if LINES == 1:
        return tl.reshape(lines[0], [lines[0].shape[0], lines[0].shape[1], 1])
    elif LINES == 2:
        return tl.join(lines[0], lines[1])
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(LINES // 2):
            evens = evens + (lines[2 * i],)
            odds = odds + (lines[2 * i + 1],)
        pairs = tl.join(join_lines(evens, LINES // 2), join_lines(odds, LINES // 2))
        return tl.reshape(pairs, [pairs.shape[0], pairs.shape[1], LINES])


@triton.jit
def _shift(flat, n_away):
    """A flat tensor's first half moved ``n_away`` places to the right, its second half as many to the left.

    The gather runs over a flat tensor: for one of higher rank the compiler arranges whole rows inside each warp, and
    moves them by hundreds of shuffles. Places that no value is moved to hold any value.
    """
    SLOTS: tl.constexpr = flat.shape[0]
    slot = tl.arange(0, SLOTS)
    source = tl.where(slot < SLOTS // 2, slot - n_away, slot + n_away)
    source = tl.minimum(tl.maximum(source, 0), SLOTS - 1)
    return tl.gather(flat, source, axis=0)


@triton.jit
def _from_neighbours(to_right, to_left, n_away):
    """``to_right`` moved ``n_away`` columns to the right and ``to_left`` as many to the left."""
    C: tl.constexpr = to_right.shape[0]
    N: tl.constexpr = to_right.shape[1]
    moved = _shift(tl.reshape(tl.permute(tl.join(to_right, to_left), (2, 0, 1)), [2 * C * N]), n_away)
    return tl.split(tl.permute(tl.reshape(moved, [2, C, N]), (1, 2, 0)))


@triton.jit
def _pairs_from_neighbours(to_right, to_left, last, first):
    """:func:`_from_neighbours` of ``(to_right, to_left)`` and of ``(last, first)``, for the price of one trip."""
    C: tl.constexpr = to_right.shape[0]
    N: tl.constexpr = to_right.shape[1]
    edges = tl.join(tl.join(to_right, to_left), tl.join(last, first))
    moved = _shift(tl.reshape(tl.permute(edges, (2, 3, 0, 1)), [4 * C * N]), 1)
    ones, others = tl.split(tl.permute(tl.reshape(moved, [2, 2, C, N]), (2, 3, 0, 1)))
    from_left, from_right = tl.split(ones)
    first_left, first_right = tl.split(others)
    return from_left, from_right, first_left, first_right


@triton.jit
def _columns(b, VECTOR: tl.constexpr):
    """The VECTOR consecutive columns that each thread holds, one by one."""
    return split_lines(tl.reshape(b, [b.shape[0], b.shape[1] // VECTOR, VECTOR]), VECTOR)


@triton.jit
def _rows(columns, VECTOR: tl.constexpr):
    """The inverse of :func:`_columns`."""
    b = join_lines(columns, VECTOR)
    return tl.reshape(b, [b.shape[0], b.shape[1] * VECTOR])


@triton.jit
def neighbours(to_right, to_left, VECTOR: tl.constexpr):
    """``to_right[.., j - 1]`` and ``to_left[.., j + 1]`` for each ``j``; at the ends of a row, any value.

    The threads hold VECTOR consecutive columns each, so only the last of ``to_right`` and the first of ``to_left``
    leave them.
    """
    if VECTOR == 1:
        return _from_neighbours(to_right, to_left, 1)
    else:
        rights, lefts = _columns(to_right, VECTOR), _columns(to_left, VECTOR)
        from_left, from_right = _from_neighbours(rights[VECTOR - 1], lefts[0], 1)
        b_left = _rows((from_left,) + rights[0 : VECTOR - 1], VECTOR)
        return b_left, _rows(lefts[1:VECTOR] + (from_right,), VECTOR)


@triton.jit
def neighbour_pairs(to_right, to_left, both, VECTOR: tl.constexpr):
    """:func:`neighbours` of ``(to_right, to_left)`` and of ``(both, both)``, for the price of one trip."""
    if VECTOR == 1:
        return _pairs_from_neighbours(to_right, to_left, both, both)
    else:
        rights, lefts, columns = _columns(to_right, VECTOR), _columns(to_left, VECTOR), _columns(both, VECTOR)
        from_left, from_right, both_left, both_right = _pairs_from_neighbours(
            rights[VECTOR - 1], lefts[0], columns[VECTOR - 1], columns[0]
        )
        a, b = _rows((from_left,) + rights[0 : VECTOR - 1], VECTOR), _rows(lefts[1:VECTOR] + (from_right,), VECTOR)
        c = _rows((both_left,) + columns[0 : VECTOR - 1], VECTOR)
        return a, b, c, _rows(columns[1:VECTOR] + (both_right,), VECTOR)


@triton.jit
def chunk_neighbours(to_right, to_left, n_away, GROUP: tl.constexpr):
    """``[1, LANES]`` each: ``to_right`` moved ``n_away`` lanes up and ``to_left`` as many down, within groups of lanes.

    A group of 32 is a warp, in which values move by shuffles; the only other group is that of all lanes, which exchange
    them through shared memory. Where nothing is moved to is any value.
    """
    LANES: tl.constexpr = to_right.shape[1]
    if GROUP == 32:
        lane = tl.arange(0, LANES) % 32
        from_left = tl.reshape(tl.maximum(lane - n_away, 0), [LANES // 32, 32])
        from_right = tl.reshape(tl.minimum(lane + n_away, 31), [LANES // 32, 32])
        left = tl.gather(tl.reshape(to_right, [LANES // 32, 32]), from_left, axis=1)
        right = tl.gather(tl.reshape(to_left, [LANES // 32, 32]), from_right, axis=1)
        return tl.reshape(left, [1, LANES]), tl.reshape(right, [1, LANES])
    else:
        return _from_neighbours(to_right, to_left, n_away)
