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
        return tl.expand_dims(lines[0], 2)
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(LINES // 2):
            evens = evens + (lines[2 * i],)
            odds = odds + (lines[2 * i + 1],)
        pairs = tl.join(join_lines(evens, LINES // 2), join_lines(odds, LINES // 2))
        return tl.reshape(pairs, [pairs.shape[0], pairs.shape[1], LINES])


@triton.jit
def _shift(edges):
    """``[C, N, 2]`` to two ``[C, N]``: the first column moved one place to the right, the second one to the left.

    The gather runs over a flat tensor: for one of higher rank the compiler arranges whole rows inside each warp, and
    moves them by hundreds of shuffles. What ends up where nothing comes from is anything at all.
    """
    C: tl.constexpr = edges.shape[0]
    N: tl.constexpr = edges.shape[1]
    SLOTS: tl.constexpr = 2 * C * N
    slot = tl.arange(0, SLOTS)
    source = tl.where(slot < SLOTS // 2, slot - 1, slot + 1)
    source = tl.minimum(tl.maximum(source, 0), SLOTS - 1)
    moved = tl.gather(tl.reshape(tl.permute(edges, (2, 0, 1)), [SLOTS]), source, axis=0)
    return tl.split(tl.permute(tl.reshape(moved, [2, C, N]), (1, 2, 0)))


@triton.jit
def _shift_pairs(edges):
    """``[C, N, 2, 2]`` to four ``[C, N]``: :func:`_shift` along the third axis, for both halves of the last at once."""
    C: tl.constexpr = edges.shape[0]
    N: tl.constexpr = edges.shape[1]
    SLOTS: tl.constexpr = 4 * C * N
    slot = tl.arange(0, SLOTS)
    source = tl.where(slot < SLOTS // 2, slot - 1, slot + 1)
    source = tl.minimum(tl.maximum(source, 0), SLOTS - 1)
    moved = tl.gather(tl.reshape(tl.permute(edges, (2, 3, 0, 1)), [SLOTS]), source, axis=0)
    first, second = tl.split(tl.permute(tl.reshape(moved, [2, 2, C, N]), (2, 3, 0, 1)))
    first_left, first_right = tl.split(first)
    second_left, second_right = tl.split(second)
    return first_left, first_right, second_left, second_right


@triton.jit
def neighbours(to_right, to_left, VECTOR: tl.constexpr):
    """``to_right[.., j - 1]`` and ``to_left[.., j + 1]`` for each ``j``; at the ends of a row, anything at all.

    The threads hold VECTOR consecutive columns each, so only the last of ``to_right`` and the first of ``to_left``
    leave them.
    """
    if VECTOR == 1:
        return _shift(tl.join(to_right, to_left))
    else:
        C: tl.constexpr = to_right.shape[0]
        N: tl.constexpr = to_right.shape[1]
        rights = split_lines(tl.reshape(to_right, [C, N // VECTOR, VECTOR]), VECTOR)
        lefts = split_lines(tl.reshape(to_left, [C, N // VECTOR, VECTOR]), VECTOR)
        from_left, from_right = _shift(tl.join(rights[VECTOR - 1], lefts[0]))
        left = join_lines((from_left,) + rights[0 : VECTOR - 1], VECTOR)
        right = join_lines(lefts[1:VECTOR] + (from_right,), VECTOR)
        return tl.reshape(left, [C, N]), tl.reshape(right, [C, N])


@triton.jit
def neighbour_pairs(to_right, to_left, both, VECTOR: tl.constexpr):
    """:func:`neighbours` of ``(to_right, to_left)`` and of ``(both, both)``, for the price of one trip."""
    if VECTOR == 1:
        return _shift_pairs(tl.join(tl.join(to_right, to_left), tl.join(both, both)))
    else:
        C: tl.constexpr = to_right.shape[0]
        N: tl.constexpr = to_right.shape[1]
        rights = split_lines(tl.reshape(to_right, [C, N // VECTOR, VECTOR]), VECTOR)
        lefts = split_lines(tl.reshape(to_left, [C, N // VECTOR, VECTOR]), VECTOR)
        columns = split_lines(tl.reshape(both, [C, N // VECTOR, VECTOR]), VECTOR)
        from_left, from_right, both_left, both_right = _shift_pairs(
            tl.join(tl.join(rights[VECTOR - 1], lefts[0]), tl.join(columns[VECTOR - 1], columns[0]))
        )
        a = join_lines((from_left,) + rights[0 : VECTOR - 1], VECTOR)
        b = join_lines(lefts[1:VECTOR] + (from_right,), VECTOR)
        c = join_lines((both_left,) + columns[0 : VECTOR - 1], VECTOR)
        d = join_lines(columns[1:VECTOR] + (both_right,), VECTOR)
        return tl.reshape(a, [C, N]), tl.reshape(b, [C, N]), tl.reshape(c, [C, N]), tl.reshape(d, [C, N])
