"""Where a program's tiles are: its share of the work, the addresses of pixels, and lines in and out of memory.

The names in all kernels begin with what they are:

    p_  a pointer                          o_  offsets of the elements of a tile from a pointer
    i_  an index, counted from 0           m_  a mask
    n_  a number of things                 b_  a block of values in registers
    s_  a stride of a tensor, in units of ALIGN elements; None for an axis along which the tensor is contiguous

A missing tensor is None, and so are its strides: kernels are compiled for which tensors there are and for the axis
along which each is contiguous, never for a size. Strides in units of ALIGN elements tell the compiler what they are
divisible by, for any size and not only for multiples of 16. Sizes along the axis FAST (0: channels, 1: cross, 2: lines)
are in the same units.

A tile is ``[channels, cross, lines]`` with its lines in memory order; the scan takes them from the last where REVERSE
is set. Its lines in registers are a tuple of ``[channels, cross]`` in the order of the scan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .neighbour_shuffle import join_lines, split_lines

_SIZES = ["n_groups", "n_channels", "n_cross", "n_lines", "n_run", "n_runs", "n_segment"]


def integers(*names: str) -> list[str]:
    """The run-time integers of a kernel over the tensors named. None of them may specialise it: sizes vary."""
    strides = [f"s_{name}_{axis}" for name in names for axis in ("batch", "channel", "cross", "line")]
    return strides + [f"s_{name}_tap" for name in names if "taps" in name] + _SIZES


class Share(NamedTuple):
    """A program's part of the work: a block of channels of a group of a batch entry, and a run of lines."""

    i_block: Any
    i_group: Any
    i_batch: Any
    i_start: Any
    """The first line, counted as they are scanned."""
    i_low: Any
    """The first line in memory."""
    i_high: Any
    """The line after the last one in memory."""


class View(NamedTuple):
    """A tensor at a tile: the tile's addresses are ``p + o``, and int64 steps lead to another tile."""

    p: Any
    o: Any
    s_line: Any
    s_cross: Any


@triton.jit
def share(n_blocks, n_groups, n_lines, n_run, n_runs, REVERSE: tl.constexpr):
    """The :class:`Share` of a program. Programs of a group follow each other: they read the same taps.

    ``n_groups`` is None where one program's channels may be of any group.
    """
    i_program = tl.program_id(0)
    i_block = i_program % n_blocks
    i_program //= n_blocks
    i_start = i_program % n_runs * n_run
    i_program //= n_runs
    n = tl.minimum(n_run, n_lines - i_start)
    i_low = n_lines - i_start - n if REVERSE else i_start
    if n_groups is None:
        i_group, i_batch = tl.cast(0, tl.int64), i_program.to(tl.int64)
    else:
        i_group, i_batch = (i_program % n_groups).to(tl.int64), (i_program // n_groups).to(tl.int64)
    return Share(i_block, i_group, i_batch, i_start, i_low, i_low + n)


@triton.jit
def extent_within(p_size, n_map):
    """An extent of an image within its map, of which any number may have been asked for."""
    return tl.minimum(tl.maximum(tl.load(p_size), 0), n_map).to(tl.int32)


@triton.jit
def share_of_image(mine, p_sizes, i_lines, n_lines, n_cross, n_run, REVERSE: tl.constexpr):
    """The :class:`Share` of a program whose image is smaller than its map, and the image's lines and their length.

    ``sizes [B, 2]`` are the two of each image; ``i_lines``, 0 or 1, which of them is the lines. A program may be left
    without any.
    """
    p_sizes += mine.i_batch * 2
    n_own, n_own_cross = extent_within(p_sizes + i_lines, n_lines), extent_within(p_sizes + 1 - i_lines, n_cross)
    n = tl.maximum(tl.minimum(n_run, n_own - mine.i_start), 0)
    i_low = n_own - mine.i_start - n if REVERSE else mine.i_start
    return Share(mine.i_block, mine.i_group, mine.i_batch, mine.i_start, i_low, i_low + n), n_own, n_own_cross


@triton.jit
def in_elements(n_channels, n_cross, n_lines, n_run, FAST: tl.constexpr, ALIGN: tl.constexpr):
    """The sizes of a scan, those along FAST no longer in units of ALIGN elements."""
    if FAST == 0:
        n_channels *= ALIGN
    elif FAST == 1:
        n_cross *= ALIGN
    else:
        n_lines *= ALIGN
        n_run *= ALIGN
    return n_channels, n_cross, n_lines, n_run


@triton.jit
def _along(i, s, ALIGN: tl.constexpr):
    """The offset of index ``i`` along an axis of stride ``s``."""
    return i if s is None else i * s * ALIGN


@triton.jit
def view(p, i_batch, i_channel, o_tile, strides, ALIGN: tl.constexpr):
    """The :class:`View` of a tensor at the first pixel of a channel of a batch entry, both of which are int64.

    ``o_tile`` are the indices of the tile's elements (channel, cross, line), in the integers that the offsets are in;
    ``strides`` those of the batch and of these three.
    """
    s_batch, s_channel, s_cross, s_line = strides
    p = p + i_batch * s_batch * ALIGN + _along(i_channel, s_channel, ALIGN)
    o = _along(o_tile[0], s_channel, ALIGN) + _along(o_tile[1], s_cross, ALIGN) + _along(o_tile[2], s_line, ALIGN)
    one = tl.cast(1, tl.int64)
    return View(p, o, _along(one, s_line, ALIGN), _along(one, s_cross, ALIGN))


@triton.jit
def move(v, i_line, i_cross):
    """The view so many lines and positions further in memory."""
    return View(v.p + i_line.to(tl.int64) * v.s_line + i_cross.to(tl.int64) * v.s_cross, v.o, v.s_line, v.s_cross)


@triton.jit
def tap(v, s_tap, K: tl.constexpr):
    """The view of tap K of a tensor of taps; ``s_tap`` is int64 and counts elements."""
    return View(v.p + K * s_tap, v.o, v.s_line, v.s_cross)


@triton.jit
def _scan_order(lines, LINES: tl.constexpr, REVERSE: tl.constexpr):
    """A tuple of lines from memory order to the order of the scan, or back."""
    if REVERSE:
        reversed_lines = ()
        for i in tl.static_range(LINES):
            reversed_lines = (lines[i],) + reversed_lines
        return reversed_lines
    else:
        return lines


@triton.jit
def load_lines(v, m, LINES: tl.constexpr, REVERSE: tl.constexpr):
    """The lines of the tile at a view, in the dtype they have in memory."""
    return _scan_order(split_lines(tl.load(v.p + v.o, mask=m, other=0.0), LINES), LINES, REVERSE)


@triton.jit
def store_lines(v, i_line, lines, m, GROUP: tl.constexpr, REVERSE: tl.constexpr, SUM: tl.constexpr = False):
    """Store GROUP lines from line ``i_line`` of the tile at a view on, or the SUM of their channels."""
    b = join_lines(_scan_order(lines, GROUP, REVERSE), GROUP)
    if SUM:
        b = tl.sum(b, axis=0, keep_dims=True)
    p = v.p + i_line * v.s_line + v.o
    tl.store(p, b.to(p.dtype.element_ty), mask=m)


# --- Rows longer than a block -----------------------------------------------------------------------------------------
#
# With HALO 0 a row is one block and the state stays in registers. Else a program takes HALO lines of one block of the
# row after the other: a round. The blocks overlap by HALO on each side, where each line leaves one more pixel out of
# date, and only the pixels between are stored. The states after those lines are in ``p_states [programs, 2, BLOCK_C,
# n_cross]`` (FAST 0: channels last) until the next round. ``p_states`` is None if HALO is 0.


class States(NamedTuple):
    """Where a program's states are between two rounds."""

    p: Any
    o: Any


@triton.jit
def states(p_states, i_channel, i_cross, n_cross, BLOCK_C: tl.constexpr, FAST: tl.constexpr):
    """The :class:`States` of a program, for a block that begins at the first position."""
    o = i_cross * BLOCK_C + i_channel if FAST == 0 else i_channel * n_cross + i_cross
    return States(p_states + tl.program_id(0).to(tl.int64) * 2 * BLOCK_C * n_cross, o)


@triton.jit
def tile(
    i_round, i_visit, n_rounds, mine, n_lines, BLOCK_N: tl.constexpr, HALO: tl.constexpr, LINES: tl.constexpr,
    TILES: tl.constexpr, ADJOINT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A tile of a round: its first line as the program scans them and in memory, and its first position.

    A round visits each block of the row TILES times. An ADJOINT scan begins with the last tile.
    """
    if ADJOINT:
        i_step = ((n_rounds - i_round) * TILES - 1 - i_visit % TILES) * LINES
    else:
        i_step = (i_round * TILES + i_visit % TILES) * LINES
    i_line = n_lines - mine.i_start - i_step - LINES if REVERSE else mine.i_start + i_step
    i_first = i_visit // TILES * (BLOCK_N - 2 * HALO) - HALO
    return i_step, i_line, i_first


@triton.jit
def load_state(
    b_state, between, i_round, i_visit, i_first, i_cross, n_cross,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """At the first tile of a block, the state that the last round left there; else ``b_state``."""
    arrives = i_visit % TILES == 0
    n_reached = tl.where(arrives, tl.where(i_round > 0, n_cross, 0), 0)
    p = between.p + (i_round % 2) * BLOCK_C * n_cross + i_first * (BLOCK_C if FAST == 0 else 1)
    b_left = tl.load(p + between.o, mask=(i_cross >= 0) & (i_cross < n_reached), other=0.0)
    return tl.where(arrives, b_left, b_state)


@triton.jit
def store_state(
    b_state, between, i_round, i_visit, i_first, i_cross, n_cross, m_kept,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """After the last tile of a block, leave the state for the next round."""
    n_reached = tl.where(i_visit % TILES == TILES - 1, n_cross, 0)
    p = between.p + ((i_round + 1) % 2) * BLOCK_C * n_cross + i_first * (BLOCK_C if FAST == 0 else 1)
    tl.store(p + between.o, b_state, mask=m_kept & (i_cross < n_reached))
