"""Where a program's tiles are: its share of the work, the addresses of pixels, and lines in and out of memory.

A tile is ``[channels, cross, lines]`` with its lines in memory order; the scan takes them from the last where REVERSE
is set. FAST is the axis of the tile (0, 1 or 2) along which a tensor is contiguous, 3 if there is none. Strides count
ALIGN elements: this is how the compiler learns what they are divisible by, for any size and not only for multiples of
16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .neighbour_shuffle import join_lines, split_lines

_SIZES = ["groups", "channels", "width", "lines", "chunk", "chunks", "segment"]


def integers(*names: str) -> list[str]:
    """The run-time integers of a kernel over the tensors named. None of them may specialise it: sizes vary."""
    strides = [f"{name}_{axis}" for name in names for axis in ("batch", "channel", "cross", "line")]
    return strides + [f"{name}_tap" for name in names if "taps" in name] + _SIZES


@triton.jit
def locate(blocks, groups, lines, chunk, chunks, REVERSE: tl.constexpr):
    """What is this program's: its channel block, group, batch entry and lines ``start, low, high``.

    ``start`` counts scanned lines, ``[low, high)`` are the same lines in memory. Programs of a group follow each other:
    they read the same taps.
    """
    program = tl.program_id(0)
    block = program % blocks
    program //= blocks
    start = program % chunks * chunk
    program //= chunks
    count = tl.minimum(chunk, lines - start)
    low = lines - start - count if REVERSE else start
    return block, (program % groups).to(tl.int64), (program // groups).to(tl.int64), start, low, low + count


@triton.jit
def anchor(pointer, batch, channel, batch_stride, channel_stride, FAST: tl.constexpr, ALIGN: tl.constexpr):
    """A tensor's pointer at the first pixel of a channel of a batch entry; both places are int64."""
    at_channel = channel if FAST == 0 else channel * channel_stride * ALIGN
    return pointer + batch * batch_stride * ALIGN + at_channel


@triton.jit
def stride(units, AXIS: tl.constexpr, FAST: tl.constexpr, ALIGN: tl.constexpr):
    """The int64 stride of a tensor along an axis of the tile, in elements."""
    step = units.to(tl.int64) * ALIGN
    if AXIS == FAST:
        step = step * 0 + 1
    return step


@triton.jit
def place(channel, cross, line, channel_stride, cross_stride, line_stride, FAST: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets of a tile's pixels from its first, in the integers that the places are in."""
    at_channel = channel if FAST == 0 else channel * channel_stride * ALIGN
    at_cross = cross if FAST == 1 else cross * cross_stride * ALIGN
    at_line = line if FAST == 2 else line * line_stride * ALIGN
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
def load_lines(pointer, at, mask, LINES: tl.constexpr, REVERSE: tl.constexpr):
    """The lines of a tile as a tuple in scan order, in the dtype they have in memory."""
    return _scan_order(split_lines(tl.load(pointer + at, mask=mask, other=0.0), LINES), LINES, REVERSE)


@triton.jit
def store_lines(pointer, at, lines, mask, GROUP: tl.constexpr, REVERSE: tl.constexpr, SUM: tl.constexpr = False):
    """Store a tuple of GROUP lines in scan order, or the SUM of their channels."""
    tile = join_lines(_scan_order(lines, GROUP, REVERSE), GROUP)
    if SUM:
        tile = tl.sum(tile, axis=0, keep_dims=True)
    tl.store(pointer + at, tile.to(pointer.dtype.element_ty), mask=mask)
