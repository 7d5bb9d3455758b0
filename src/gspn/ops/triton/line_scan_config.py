"""What a launch looks like: block sizes and all else that a kernel is compiled for, by rules and without autotuning.

A plan depends on shapes, strides and the card's shared memory alone, so that the same call is always computed the same
way and what would be launched can be compiled and inspected on a machine without a GPU. The rules count bytes: a scan
is bound by memory, and what a program must do is keep some tens of kilobytes of loads in flight, in full sectors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

CHANNEL, CROSS, LINE, NONE = 0, 1, 2, 3
"""The axes of a tile; NONE where a tensor is contiguous along none of them."""

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a program may use on data-centre cards since sm_90; 163 KB on sm_80, 99 KB elsewhere."""

_IN_FLIGHT = 60 * 1024
"""Bytes of loads that a program should have under way: what hides their latency when it has a multiprocessor alone."""

_ENOUGH_PROGRAMS = 256
"""Below about two programs for each multiprocessor, smaller programs are better than efficient ones."""


class Strides(NamedTuple):
    """The strides of a ``[B, C, H, W]`` or ``[B, G, 3, H, W]`` tensor as a scan in some direction sees them."""

    batch: int
    channel: int
    cross: int
    line: int
    tap: int = 0


_ABSENT = Strides(0, 0, 0, 0)


class Sizes(NamedTuple):
    """The sizes of a scan."""

    batch: int
    channels: int
    groups: int
    cross: int
    lines: int


class Limits(NamedTuple):
    """Where a row is too long for one block; the tests lower it to reach the code for longer rows with short ones."""

    shared_memory: int = SHARED_MEMORY
    row: int | None = None
    """The longest row of one block, a power of two from 32 on; None for the rules' own choice."""


@dataclass(frozen=True)
class LaunchPlan:
    """One launch."""

    programs: int
    num_warps: int
    constants: Mapping[str, Any]
    """The kernel's constexpr arguments."""
    integers: Mapping[str, int]
    """Its sizes and strides."""
    blocks: int
    """Programs that share the channels of one group."""
    states: tuple[int, ...] | None
    """Shape of the float32 scratch that rows longer than a block need."""
    shared_memory: int
    """Bytes of shared memory that the tiles under way take, an estimate."""


class _Blocks(NamedTuple):
    channels: int
    row: int
    halo: int
    lines: int
    stages: int


def power_of_two(size: int) -> int:
    """The smallest that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def without_ones(strides: Strides, sizes: Sizes, shared: bool) -> Strides:
    """An axis of one element may have any stride: call it 0."""
    return Strides(
        strides.batch if sizes.batch > 1 else 0,
        strides.channel if (sizes.groups if shared else sizes.channels) > 1 else 0,
        strides.cross if sizes.cross > 1 else 0,
        strides.line if sizes.lines > 1 else 0,
        strides.tap,
    )


def unit_axes(strides: Strides, shared: bool) -> tuple[int, ...]:
    """The axes along which a tensor is contiguous; taps shared by the channels have no channel axis."""
    axes = [axis for axis, step in ((CROSS, strides.cross), (LINE, strides.line)) if step == 1]
    if strides.channel == 1 and not shared:
        axes.append(CHANNEL)
    return tuple(axes)


def fast_axis(units: Mapping[str, tuple[int, ...]], shared: bool) -> int:
    """The axis along which most of what is read and written is contiguous."""
    votes: dict[int, int] = dict.fromkeys((CROSS, CHANNEL, LINE), 0)
    for name, axes in units.items():
        for axis in axes:
            votes[axis] += 1 if "taps" not in name else 0 if shared else 3
    return max(votes, key=votes.__getitem__)


def alignment(strides: Mapping[str, Strides], fast: Mapping[str, int], sizes: tuple[int, ...], most: int) -> int:
    """The largest power of two up to ``most`` that divides these sizes and all strides but those along ``fast``."""
    common = most
    for size in sizes:
        common = math.gcd(common, size)
    for name, tensor in strides.items():
        for axis, step in ((CHANNEL, tensor.channel), (CROSS, tensor.cross), (LINE, tensor.line)):
            if axis != fast[name]:
                common = math.gcd(common, step)
        common = math.gcd(common, tensor.batch, tensor.tap)
    return common


def _smaller_until_enough(block: int, least: int, programs_of_one: int, size: int) -> int:
    """Halve a block of channels while there are too few programs."""
    while block > least and programs_of_one * math.ceil(size / block) < _ENOUGH_PROGRAMS:
        block //= 2
    return block


class _Memory(NamedTuple):
    """Counts the shared memory of a program."""

    images: int
    """How many tensors like x it reads."""
    shared: bool
    itemsize: int
    exchanged: int
    """Bytes that each pixel of a line takes to reach its neighbours."""
    available: int

    def tile(self, block: int, row: int, lines: int) -> int:
        """Bytes of one tile of all tensors read."""
        return (self.images * block + 3 * (1 if self.shared else block)) * row * lines * self.itemsize

    def total(self, blocks: _Blocks) -> int:
        """Bytes of the tiles under way, of the states that wait for long rows, and of what neighbours exchange."""
        pixels = blocks.channels * blocks.row
        one = self.tile(blocks.channels, blocks.row, blocks.lines) + (4 * pixels if blocks.halo else 0)
        return (blocks.stages - 1) * one + self.exchanged * pixels

    def staged(self, blocks: _Blocks) -> _Blocks:
        """The blocks with as many stages as hide the latency and fit; a single stage reads nothing ahead."""
        wanted = math.ceil(_IN_FLIGHT / self.tile(blocks.channels, blocks.row, blocks.lines))
        blocks = blocks._replace(stages=min(max(wanted, 2), 5) + 1)
        while blocks.stages > 1 and self.total(blocks) > self.available:
            blocks = blocks._replace(stages=blocks.stages - 1)
        return blocks


def _choose_blocks(fast: int, sizes: Sizes, channels: int, align: int, memory: _Memory, limits: Limits) -> _Blocks:
    """The sizes of a tile, with ``channels`` to be shared out in blocks."""
    images, shared, itemsize, _, _ = memory
    width, rows = sizes.cross, power_of_two(sizes.cross)
    most_channels = power_of_two(channels)
    programs = sizes.batch * (sizes.groups if shared else 1)

    if fast == LINE:
        # A full sector of each row, one row a thread. A long row is taken in blocks, and two sectors of each block
        # before the next: memory reads sectors by twos.
        lines = min(32 // itemsize, power_of_two(sizes.lines))
        if align * itemsize < 16:
            # Short pieces take an address each: in registers that the lines need.
            lines = min(lines, 8 if align * itemsize > 4 or images == 2 else 4)
        block = max(64 // rows, 1)
        if shared:
            block = _smaller_until_enough(2 if images > 2 and itemsize == 2 else 4, 1, programs, channels)
        block = min(block, most_channels)
        row = min(rows, limits.row or (128 if shared else 512 if images == 2 else 256))
        while True:
            few = min(lines, row // 4) if width > row else lines
            halo = 0 if width <= row else 2 * few if row > 4 * few else few
            blocks = _Blocks(block, row, halo, few, 2)
            if row == 32 or memory.total(blocks) <= memory.available:
                return blocks
            row //= 2

    if fast == CROSS:
        longest = limits.row or 4096
        row = min(rows, longest)
        block = max((128 if not shared else 2048 if images == 2 else 4096) // row, 1)
        block = min(_smaller_until_enough(block, max(128 // itemsize // row, 1), programs, channels), most_channels)
        if width <= longest:
            return memory.staged(_Blocks(block, row, 0, 1, 1))
        row = limits.row or 2048
        return memory.staged(_Blocks(block, row, 16 if row >= 64 else 8, 1, 1))

    # Channels last: 64 bytes of channels, two sectors, or one or less where there are few programs.
    row = min(rows, limits.row or 256)
    block = max(min(64 // itemsize, 2048 // row), 32 // itemsize)
    block = min(_smaller_until_enough(block, 16 // itemsize, programs, channels), most_channels)
    return memory.staged(_Blocks(block, row, 8 if width > row else 0, 1, 1))


def run_length(lines: int, segment: int, tile_lines: int) -> int:
    """How many lines one program scans: whole segments and whole tiles, enough to be worth starting."""
    unit = math.lcm(segment, tile_lines)
    run = unit * math.ceil(32 / unit)
    return run if run < lines else lines


@functools.lru_cache(maxsize=4096)
def plan(
    sizes: Sizes,
    tensors: tuple[tuple[str, Strides | None], ...],
    itemsize: int,
    *,
    reverse: bool,
    segment: int | None,
    backward: bool,
    has_lam: bool,
    need_taps: bool = False,
    need_lam: bool = False,
    limits: Limits,
) -> LaunchPlan:
    """The launch of ``forward_kernel`` or ``backward_kernel`` for tensors of these sizes and strides.

    Args:
        sizes: none of them 0.
        tensors: each tensor of the kernel by the name of its argument, with its strides; None for those not there.
        itemsize: bytes of an element.
        reverse: whether the first line scanned is the last in memory.
        segment: lines after which the recurrence restarts, None for never.
        backward: which of the two kernels.
        has_lam: whether there is a gate.
        need_taps: whether the backward computes ``dtaps``.
        need_lam: whether it computes ``dlam``.
        limits: what the card has, and for tests when a row is long.
    """
    shared = sizes.channels != sizes.groups
    channels = sizes.channels // sizes.groups if shared else sizes.channels
    strides = {name: without_ones(s, sizes, shared and "taps" in name) for name, s in tensors if s is not None}
    units = {name: unit_axes(s, shared and "taps" in name) for name, s in strides.items()}
    fast = fast_axis(units, shared)
    own = {name: fast if fast in axes else axes[0] if axes else NONE for name, axes in units.items()}

    images = {name: s for name, s in strides.items() if "taps" not in name}
    taps = {name: s for name, s in strides.items() if "taps" in name}
    along = {CHANNEL: channels, CROSS: sizes.cross, LINE: sizes.lines}[fast]
    align = alignment(images, own, (along,), 16 // itemsize)
    taps_align = alignment(taps, own, (), 16 // itemsize)
    if fast == CROSS:
        # Four pixels a thread: what a warp of more would gain in wider loads, the program loses in warps.
        align, taps_align = min(align, 4), min(taps_align, 4)
    count = 1 + has_lam if not backward else 1 + has_lam + need_lam + need_taps
    exchanged = (16 if need_taps else 8) // (align if fast == CROSS else 1)
    memory = _Memory(max(count, 2), shared, itemsize, exchanged, limits.shared_memory)
    blocks = _choose_blocks(fast, sizes, channels, align, memory, limits)

    restart = sizes.lines if segment is None else min(segment, sizes.lines)
    run = run_length(sizes.lines, restart, blocks.lines if fast == LINE else 1)
    if fast == LINE and run % align:
        run = sizes.lines
    runs = math.ceil(sizes.lines / run)
    channel_blocks = math.ceil(channels / blocks.channels)
    outer = sizes.groups if shared else 1
    programs = sizes.batch * outer * runs * channel_blocks

    pixels = blocks.channels * blocks.row
    per_thread = 1 if fast == LINE else min(4, align) if pixels < 256 else 4
    num_warps = min(max(pixels // (32 * per_thread), 1), 16 if fast == LINE or pixels >= 2048 else 8)
    if shared and fast != LINE:
        # Only copies of 4 bytes a thread can be under way while others are computed with, and shared taps are few.
        num_warps = max(min(num_warps, blocks.row * itemsize // 128), pixels // 256, 1)
    vector = min(align, max(pixels // (32 * num_warps), 1)) if fast == CROSS else 1
    extent = max(
        (blocks.channels - 1) * abs(s.channel) + blocks.row * abs(s.cross) + blocks.lines * abs(s.line)
        for s in strides.values()
    )
    pattern = {(s.channel, s.cross, s.line) for s in images.values()}
    # A thread's own lines make 16 bytes; shorter pieces are better put together with those of other threads first.
    group = 1 if fast != LINE else align if align * itemsize >= 16 else blocks.lines

    constants: dict[str, Any] = {f"{name.upper()}_FAST": own.get(name, NONE) for name, _ in tensors}
    constants.update(
        FAST=fast,
        ALIGN=align,
        TAPS_ALIGN=taps_align,
        UNIFORM=len(pattern) == 1,
        WIDE=extent >= 2**31,
        BLOCK_C=blocks.channels,
        BLOCK_N=blocks.row,
        HALO=blocks.halo,
        LINES=blocks.lines,
        GROUP=min(group, blocks.lines),
        VECTOR=vector,
        REVERSE=reverse,
        SEGMENTED=restart < run,
        SHARED=shared,
        HAS_LAM=has_lam,
        STAGES=blocks.stages,
    )
    if backward:
        constants.update(NEED_TAPS=need_taps, NEED_LAM=need_lam)

    integers = {
        "groups": outer,
        "channels": channels // align if fast == CHANNEL else channels,
        "width": sizes.cross // align if fast == CROSS else sizes.cross,
        "lines": sizes.lines // align if fast == LINE else sizes.lines,
        "chunk": run // align if fast == LINE else run,
        "chunks": runs,
        "segment": restart,
    }
    for name, _ in tensors:
        s = strides.get(name, _ABSENT)
        unit = taps_align if "taps" in name else align
        for axis, step in zip(("batch", "channel", "cross", "line"), s[:4], strict=True):
            integers[f"{name}_{axis}"] = step // unit
        if "taps" in name:
            integers[f"{name}_tap"] = s.tap // unit
    return LaunchPlan(
        programs=programs,
        num_warps=num_warps,
        constants=constants,
        integers=integers,
        blocks=channel_blocks,
        states=(programs, 2, blocks.channels, sizes.cross) if blocks.halo else None,
        shared_memory=memory.total(blocks),
    )
