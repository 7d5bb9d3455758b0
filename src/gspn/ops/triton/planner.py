"""Plans of launches: block sizes and all else that a kernel is compiled for, by rules and without autotuning.

A plan depends on shapes, strides and the card's shared memory alone. The same call is therefore always computed the
same way, and what would be launched can be compiled and inspected on a machine without a GPU. Each operator has its own
rules for the size of a block and its threads; everything else is :class:`_Layout`, which both share.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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


_Tensors = tuple[tuple[str, Strides | None], ...]
"""Each tensor by the name of its argument; None for those that a kernel does without."""


class Sizes(NamedTuple):
    """The sizes of a scan, none of them 0."""

    batch: int
    channels: int
    groups: int
    cross: int
    lines: int


class Limits(NamedTuple):
    """Bounds on a plan beside the call's sizes: the card's memory, and what tests and measurements impose."""

    shared_memory: int = SHARED_MEMORY
    row: int | None = None
    """The longest row of one block, a power of two from 32 on; None for the rules' own choice."""
    ptx: bool = True
    """Whether kernels may have instructions of NVIDIA's cards."""
    tensor_cores: bool = False
    """Whether the maps of short rows may be made by tensor cores: these are fast at TF32, and Gluon is there."""
    together: bool = True
    """Whether directions may run side by side where each has too few rows for a card."""
    like: tuple[int, int] | None = None
    """Batch and channels of the call whose blocks are wanted; None for those of this call."""
    choice: tuple[tuple[str, int], ...] = ()
    """Values by name in place of what the rules choose: of the blocks, ``num_warps``, of the chunks, or ``warps``."""


@dataclass(frozen=True)
class Plan:
    """Everything about a launch but its tensors."""

    grid: tuple[int, ...]
    num_warps: int
    constants: Mapping[str, Any]
    """The kernel's constexpr arguments."""
    integers: Mapping[str, int | None]
    """Its sizes and strides; None for the stride of an axis along which a tensor is contiguous."""
    channel_blocks: int = 1
    """Programs that share the channels of one group."""
    states: tuple[int, ...] | None = None
    """Shape of the float32 scratch that rows longer than a block need."""
    shared_memory: int = 0
    """Bytes of shared memory that the tiles under way take, an estimate."""
    compiled: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """The kernels that :class:`.launch.Launch` has had compiled for this plan. Plans are kept, and these with them."""


class _Blocks(NamedTuple):
    """The size of a tile, and how many of them are under way."""

    channels: int
    row: int
    halo: int = 0
    lines: int = 1
    stages: int = 1


def _power_of_two(size: int) -> int:
    """The smallest that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def _smaller(block: int, least: int, programs_of_one: int, channels: int) -> int:
    """Halve a block of channels down to ``least`` while there are too few programs."""
    while block > least and programs_of_one * math.ceil(channels / block) < _ENOUGH_PROGRAMS:
        block //= 2
    return block


class _Layout:
    """How the tensors of a scan lie in memory, and what follows from it for any kernel.

    Groups of several channels share taps, and a program's channels are all of one group. ``most`` is the most elements
    that one thread takes together.
    """

    def __init__(self, sizes: Sizes, tensors: _Tensors, itemsize: int, segment: int | None, most: int) -> None:
        self.shared = sizes.channels != sizes.groups
        self.groups = sizes.groups if self.shared else 1
        self.channels = sizes.channels // self.groups
        self.sizes, self.itemsize = sizes, itemsize
        self.restart = sizes.lines if segment is None else min(segment, sizes.lines)
        self.tensors = {name: None if s is None else self._without_ones(name, s) for name, s in tensors}
        present = {name: s for name, s in self.tensors.items() if s is not None}
        units = {name: self._unit_axes(name, s) for name, s in present.items()}
        votes: dict[int, int] = dict.fromkeys((CROSS, CHANNEL, LINE), 0)
        for name, axes in units.items():
            for axis in axes:
                votes[axis] += 1 if "taps" not in name else 0 if self.shared else 3
        self.fast = max(votes, key=votes.__getitem__)
        """The axis along which most of what is read and written is contiguous."""
        self.own = {n: self.fast if self.fast in axes else axes[0] if axes else NONE for n, axes in units.items()}
        """The axis along which each tensor is contiguous."""
        self.images = {name: s for name, s in present.items() if "taps" not in name}
        along = {CHANNEL: self.channels, CROSS: sizes.cross, LINE: sizes.lines}[self.fast]
        # Along a row, what a warp of more would gain in wider loads, the program loses in warps.
        most = min(most, 4) if self.fast == CROSS else most
        self.align = self._alignment(self.images, along, most)
        self.taps_align = self._alignment({n: s for n, s in present.items() if "taps" in n}, 0, most)

    def _without_ones(self, name: str, s: Strides) -> Strides:
        """An axis of one element may have any stride: call it 0."""
        sizes = self.sizes
        channels = self.groups if self.shared and "taps" in name else sizes.channels
        extents = (sizes.batch, channels, sizes.cross, sizes.lines)
        batch, channel, cross, line = (stride if n > 1 else 0 for stride, n in zip(s[:4], extents, strict=True))
        return Strides(batch, channel, cross, line, s.tap)

    def _unit_axes(self, name: str, s: Strides) -> tuple[int, ...]:
        """The axes along which a tensor is contiguous; taps shared by the channels have no channel axis."""
        axes = [axis for axis, step in ((CROSS, s.cross), (LINE, s.line)) if step == 1]
        return (*axes, CHANNEL) if s.channel == 1 and not (self.shared and "taps" in name) else tuple(axes)

    def _alignment(self, tensors: Mapping[str, Strides], along: int, most: int) -> int:
        """The largest power of two up to ``most`` that divides ``along`` and all strides but those that are 1."""
        common = math.gcd(most, along)
        for name, s in tensors.items():
            own = self.own[name]
            steps = (step for axis, step in ((CHANNEL, s.channel), (CROSS, s.cross), (LINE, s.line)) if axis != own)
            common = math.gcd(common, s.batch, s.tap, *steps)
        return common

    def seen_by_rules(self, limits: Limits) -> _Layout:
        """The same with the batch and the channels of another call, if the limits name one."""
        if limits.like is None:
            return self
        other = copy.copy(self)
        other.sizes = self.sizes._replace(batch=limits.like[0], channels=limits.like[1])
        other.channels = limits.like[1] // self.groups
        return other

    def run(self, blocks: _Blocks) -> int:
        """How many lines a program scans: whole segments and whole tiles, enough to be worth starting."""
        lines = self.sizes.lines
        unit = math.lcm(self.restart, blocks.lines)
        run = unit * math.ceil(32 / unit)
        return lines if run >= lines or (self.fast == LINE and run % self.align) else run

    def channel_blocks(self, blocks: _Blocks) -> int:
        return math.ceil(self.channels / blocks.channels)

    def programs(self, blocks: _Blocks) -> int:
        runs = math.ceil(self.sizes.lines / self.run(blocks))
        return self.sizes.batch * self.groups * runs * self.channel_blocks(blocks)

    def plan(
        self, blocks: _Blocks, num_warps: int, reverse: bool, shared_memory: int = 0,
        more: Mapping[str, int | None] | None = None,
        **constants: Any,
    ) -> Plan:  # fmt: skip
        """The plan with these blocks and threads, and ``more`` integers and constants of one operator alone."""
        sizes, align, run, programs = self.sizes, self.align, self.run(blocks), self.programs(blocks)
        per_line, per_cross, per_channel = (align if self.fast == axis else 1 for axis in (LINE, CROSS, CHANNEL))
        integers: dict[str, int | None] = {
            "n_groups": self.groups if self.shared else None, "n_channels": self.channels // per_channel,
            "n_cross": sizes.cross // per_cross, "n_lines": sizes.lines // per_line, "n_run": run // per_line,
            "n_runs": math.ceil(sizes.lines / run), "n_segment": self.restart, **(more or {}),
        }  # fmt: skip
        for name, s in self.tensors.items():
            unit = self.taps_align if "taps" in name else align
            for axis, step in zip(Strides._fields, s or (None,) * 5, strict=True):
                if axis != "tap" or "taps" in name:
                    integers[f"s_{name}_{axis}"] = None if step is None else step // unit
            if s is not None and self.own[name] != NONE:
                axis = {CHANNEL: "channel", CROSS: "cross", LINE: "line"}[self.own[name]]
                integers[f"s_{name}_{axis}"] = None
        constants = dict(
            FAST=self.fast, ALIGN=align, HALO=blocks.halo, LINES=blocks.lines, REVERSE=reverse,
            SEGMENTED=self.restart < run, **constants,
        )  # fmt: skip
        states = (programs, 2, blocks.channels, sizes.cross) if blocks.halo else None
        return Plan((programs,), num_warps, constants, integers, self.channel_blocks(blocks), states, shared_memory)


# --- line_scan --------------------------------------------------------------------------------------------------------
#
# A line scan is bound by memory. The rules count bytes: what a program must do is keep some tens of kilobytes of loads
# in flight, in full sectors.


class _Memory(NamedTuple):
    """Counts the shared memory of a program."""

    images: int
    """How many tensors like x it reads."""
    shared: bool
    itemsize: int
    exchanged: int
    """Bytes that each pixel of a line takes to reach its neighbours."""
    available: int

    def tile(self, blocks: _Blocks) -> int:
        """Bytes of one tile of all tensors read."""
        tensors = self.images * blocks.channels + 3 * (1 if self.shared else blocks.channels)
        return tensors * blocks.row * blocks.lines * self.itemsize

    def total(self, blocks: _Blocks) -> int:
        """Bytes of the tiles under way, of the states that wait for long rows, and of what neighbours exchange."""
        pixels = blocks.channels * blocks.row
        return (blocks.stages - 1) * (self.tile(blocks) + (4 * pixels if blocks.halo else 0)) + self.exchanged * pixels

    def staged(self, blocks: _Blocks) -> _Blocks:
        """The blocks with as many stages as hide the latency and fit; a single stage reads nothing ahead."""
        blocks = blocks._replace(stages=min(max(math.ceil(_IN_FLIGHT / self.tile(blocks)), 2), 5) + 1)
        while blocks.stages > 1 and self.total(blocks) > self.available:
            blocks = blocks._replace(stages=blocks.stages - 1)
        return blocks


def _line_scan_blocks(layout: _Layout, memory: _Memory, limits: Limits) -> _Blocks:
    sizes, channels, align = layout.sizes, layout.channels, layout.align
    images, shared, itemsize, _, _ = memory
    rows, most_channels, programs = _power_of_two(sizes.cross), _power_of_two(channels), sizes.batch * layout.groups

    if layout.fast == LINE:
        # A full sector of each row, one row a thread. A long row is taken in blocks, and two sectors of each block
        # before the next: memory reads sectors by twos.
        lines = min(32 // itemsize, _power_of_two(sizes.lines))
        if align * itemsize < 16:
            # Short pieces take an address each: in registers that the lines need.
            lines = min(lines, 8 if align * itemsize > 4 or images == 2 else 4)
        block = max(64 // rows, 1)
        if shared:
            block = _smaller(2 if images > 2 and itemsize == 2 else 4, 1, programs, channels)
        block = min(block, most_channels)
        row = min(rows, limits.row or (128 if shared else 512 if images == 2 else 256))
        while True:
            few = min(lines, row // 4) if sizes.cross > row else lines
            halo = 0 if sizes.cross <= row else 2 * few if row > 4 * few else few
            blocks = _Blocks(block, row, halo, few, 2)
            if row == 32 or memory.total(blocks) <= memory.available:
                return blocks
            row //= 2

    if layout.fast == CROSS:
        longest = limits.row or 4096
        row = min(rows, longest)
        block = max((128 if not shared else 2048 if images == 2 else 4096) // row, 1)
        block = min(_smaller(block, max(128 // itemsize // row, 1), programs, channels), most_channels)
        if sizes.cross <= longest:
            return memory.staged(_Blocks(block, row))
        row = limits.row or 2048
        return memory.staged(_Blocks(block, row, 16 if row >= 64 else 8))

    # Channels last: 64 bytes of channels, two sectors, or one or less where there are few programs.
    row = min(rows, limits.row or 256)
    block = max(min(64 // itemsize, 2048 // row), 32 // itemsize)
    block = min(_smaller(block, 16 // itemsize, programs, channels), most_channels)
    return memory.staged(_Blocks(block, row, 8 if sizes.cross > row else 0))


@functools.lru_cache(maxsize=4096)
def plan_line_scan(
    sizes: Sizes, tensors: _Tensors, itemsize: int, *, reverse: bool, segment: int | None, limits: Limits
) -> Plan:
    """The launch of ``forward_kernel`` or ``backward_kernel`` for tensors of these sizes and strides.

    Elements have ``itemsize`` bytes; ``reverse``: the first line scanned is the last in memory.
    """
    layout = _Layout(sizes, tensors, itemsize, segment, 16 // itemsize)
    fast, align = layout.fast, layout.align
    read = layout.images.keys() - ({"dx", "dlam"} if "grad" in layout.images else {"h"})
    exchanged = (16 if layout.tensors.get("dtaps") else 8) // (align if fast == CROSS else 1)
    memory = _Memory(max(len(read), 2), layout.shared, itemsize, exchanged, limits.shared_memory)
    choice = dict(limits.choice)
    num_warps = choice.pop("num_warps", None)
    blocks = _line_scan_blocks(layout.seen_by_rules(limits), memory, limits)._replace(**choice)

    pixels = blocks.channels * blocks.row
    per_thread = 1 if fast == LINE else min(4, align) if pixels < 256 else 4
    if num_warps is None:
        num_warps = min(max(pixels // (32 * per_thread), 1), 16 if fast == LINE or pixels >= 2048 else 8)
        if layout.shared and fast != LINE:
            # Only copies of 4 bytes a thread can be under way while others are computed with, and shared taps are few.
            num_warps = max(min(num_warps, blocks.row * itemsize // 128), pixels // 256, 1)
    extent = max(
        (blocks.channels - 1) * abs(s.channel) + blocks.row * abs(s.cross) + blocks.lines * abs(s.line)
        for s in layout.tensors.values()
        if s is not None
    )
    # A thread's own lines make 16 bytes; shorter pieces are better put together with those of other threads first.
    group = 1 if fast != LINE else align if align * itemsize >= 16 else blocks.lines
    vector = min(align, max(pixels // (32 * num_warps), 1)) if fast == CROSS else 1
    uniform = len({(s.channel, s.cross, s.line) for s in layout.images.values()}) == 1
    return layout.plan(
        blocks, num_warps, reverse, memory.total(blocks), BLOCK_C=blocks.channels, BLOCK_N=blocks.row,
        STAGES=blocks.stages, TAPS_ALIGN=layout.taps_align, UNIFORM=uniform, WIDE=extent >= 2**31,
        GROUP=min(group, blocks.lines), VECTOR=vector, SHARED=layout.shared,
    )  # fmt: skip


# --- propagate --------------------------------------------------------------------------------------------------------
#
# Its scans are bound by arithmetic: the rules count instructions.

_MANY_LANES = 132 * 4 * 2 * 32
"""Two warps for each scheduler of a large card: with fewer lanes, latencies show."""


_MOST_TOGETHER = 3 * 2**20
"""Elements of an image that directions side by side may write a float32 copy of each."""


class _Chunks(NamedTuple):
    """How rows are cut for the lanes of a program."""

    lanes: int
    group: int
    """Lanes that whole rows share: a warp's, or all."""
    pixels: int
    """Pixels of a row that one lane takes."""
    halo: int = 0

    def rows(self, cross: int) -> int:
        """How many rows a program takes."""
        return 1 if self.halo else self.lanes // self.group * (self.group // math.ceil(cross / self.pixels))


def _width(layout: _Layout, pixels: int) -> int:
    """How many elements of an image a lane takes together."""
    if layout.fast == LINE:
        return layout.align
    return math.gcd(layout.align, pixels) if layout.fast == CROSS else 1


def _instructions(layout: _Layout, chunks: _Chunks, proxy_channels: int) -> float:
    """About how many a useful pixel costs, more where too few lanes or too narrow accesses let them wait."""
    sizes, fast, rows = layout.sizes, layout.fast, chunks.rows(layout.sizes.cross)
    width = _width(layout, chunks.pixels)
    each = 35 + 6 * proxy_channels + 3 / width + (0 if sizes.cross % chunks.pixels == 0 else 3)
    a_line = 25 if chunks.group == 32 else 60
    programs = sizes.batch * math.ceil(layout.channels / rows)
    useful = sizes.batch * layout.channels * sizes.cross / (programs * chunks.lanes * chunks.pixels)
    if fast == CHANNEL:
        # The channels of a group of lanes lie side by side; less than a sector of memory is read again and again.
        together = rows if chunks.group > 32 else rows * 32 // chunks.lanes
        each += 3 * max(32 / (together * layout.itemsize) - 1, 0)
    # Of programs of 256 lanes, a multiprocessor has registers for one alone: 8 warps, where smaller ones make 12.
    alone = 1.25 if chunks.lanes > 128 else 1
    return (each + a_line / chunks.pixels) / useful * alone * max(_MANY_LANES / (programs * chunks.lanes), 1)


def _chunks(layout: _Layout, proxy_channels: int, limits: Limits) -> _Chunks:
    """The chunks that cost least; a longer row is taken in blocks."""
    layout = layout.seen_by_rules(limits)
    cross, fast = layout.sizes.cross, layout.fast
    # What a lane holds for each pixel of its lines, and the weights, have to leave registers for all the rest.
    most = 4 if proxy_channels > 8 else 8
    if fast == LINE:
        most = min(most, {1: 8, 2: 5, 4: 4}[layout.align])
    pixels = most // 4 * 4  # what divides a halo
    longest = limits.row or 256 * pixels
    if cross > longest:
        pixels = longest // 32 if limits.row else pixels
        return _Chunks(longest // pixels, longest // pixels, pixels, 16 if longest > 32 else 8)
    choices = [
        _Chunks(lanes, group, pixels)
        for pixels in range(1, most + 1)
        for lanes in (32, 64, 128, 256)
        for group in (32, lanes)
        if group * pixels >= cross
    ]
    best = min(choices, key=lambda chunks: _instructions(layout, chunks, proxy_channels))
    chosen = best._replace(**dict(limits.choice))
    if chosen.group * chosen.pixels < cross:
        raise ValueError(f"{limits.choice=} leaves no room for a row of {cross}.")
    return chosen


class _Warps(NamedTuple):
    """How rows are cut for warps that take eight channels each, and make their maps by tensor cores."""

    warps: int
    """Those of a program."""
    tiles: int
    """Tiles of eight pixels of a row."""
    width: int
    """Neighbouring pixels that a lane loads at once, of the two that it has of a tile."""
    lines: int
    """Lines that it loads at once."""


_LONGEST_TENSOR_ROW = 128
"""Of a longer row a lane has no registers for the states."""


def _warp_instructions(layout: _Layout, warps: _Warps, proxy_channels: int) -> float:
    """The same as :func:`_instructions`, of warps that make their maps by tensor cores."""
    sizes, fours = layout.sizes, proxy_channels / 4
    products = math.ceil(fours * (3 if layout.itemsize == 4 else 2) / 2)
    each = 19 + 1.5 * products + 18 / warps.tiles + 18 / (warps.width * warps.lines)
    programs = sizes.batch * math.ceil(layout.channels / (8 * warps.warps))
    useful = sizes.batch * layout.channels * sizes.cross / (programs * warps.warps * warps.tiles * 64)
    return each / useful * max(_MANY_LANES / (programs * warps.warps * 32), 1)


def _warps(layout: _Layout, proxy_channels: int, limits: Limits) -> _Warps | None:
    """The warps that cost least, None where tensor cores cannot take the call or chunks cost less."""
    choice, cross = dict(limits.choice), layout.sizes.cross
    if not limits.tensor_cores or limits.row is not None or cross > _LONGEST_TENSOR_ROW:
        return None
    if math.ceil(proxy_channels / 4) not in (1, 2, 4) or (choice and "warps" not in choice):
        return None
    seen, tiles = layout.seen_by_rules(limits), math.ceil(cross / 8)
    width = math.gcd(layout.align, 2) if layout.fast == CROSS else 1
    # What a lane has loaded of several lines takes registers.
    lines = math.gcd(layout.align, _power_of_two(20 // tiles + 1) // 2) if layout.fast == LINE and tiles <= 10 else 1
    choices = [_Warps(warps, tiles, width, lines) for warps in (4, 2, 1)]

    def cost(warps: _Warps) -> float:
        return _warp_instructions(seen, warps, proxy_channels)

    best = min(choices, key=cost)
    if "warps" in choice:
        return best._replace(warps=choice["warps"])
    return best if cost(best) < _instructions(seen, _chunks(layout, proxy_channels, limits), proxy_channels) else None


def plan_propagate(
    sizes: Sizes, tensors: _Tensors, itemsize: int, proxy_channels: int, *, reverse: bool, segment: int | None,
    limits: Limits, direction: int = 0, adjoint: bool = False, gated: bool = True, padded: bool = False,
) -> Plan:  # fmt: skip
    """The launch of ``scan_kernel`` for images of these sizes and strides and a proxy of ``proxy_channels``.

    ``direction`` is the number of its projections among those of all directions. ``padded`` images may be smaller than
    their maps: their lines then begin and end anywhere, and pixels are taken one by one. Where tensor cores make the
    maps, it is a launch of ``warp_scan_kernel``.
    """
    # A block's channels may be of several groups: the layout of images knows no groups.
    layout = _Layout(sizes._replace(groups=sizes.channels), tensors, itemsize, segment, 1 if padded else 4)
    of_group = {"i_direction": direction, "n_per_group": sizes.channels // sizes.groups}
    warps = None if padded else _warps(layout, proxy_channels, limits)
    if warps is not None:
        blocks, fours = _Blocks(8 * warps.warps, 8 * warps.tiles, lines=warps.lines), math.ceil(proxy_channels / 4)
        return layout.plan(
            blocks, warps.warps, reverse, more=of_group, WARPS=warps.warps, TILES=warps.tiles, WIDTH=warps.width,
            S=proxy_channels, PARTS=fours * (2 if itemsize == 4 else 1), ADJOINT=adjoint, GATED=gated,
        )  # fmt: skip
    chunks = _chunks(layout, proxy_channels, limits)
    n_chunks = math.ceil(sizes.cross / chunks.pixels)
    of_rows = {
        **of_group, "n_chunks": n_chunks, "n_rows": max(chunks.group // n_chunks, 1), "i_codes": None,
        "s_out_direction": None, "n_images": None,
    }  # fmt: skip
    whole = not padded and not chunks.halo and sizes.cross % chunks.pixels == 0
    return _plan_lanes(
        layout, chunks, proxy_channels, reverse, of_rows, PITCH=_power_of_two(n_chunks), WHOLE=whole, ADJOINT=adjoint,
        GATED=gated, PTX=limits.ptx, TOGETHER=False,
    )  # fmt: skip


def plan_together(
    sizes: Sizes, tensors: _Tensors, itemsize: int, proxy_channels: int, codes: Sequence[int], *, segment: int | None,
    limits: Limits, adjoint: bool = False, gated: bool = True, padded: bool = False,
) -> Plan | None:  # fmt: skip
    """The launch of ``scan_kernel`` for several directions side by side, None where each has rows enough for a card.

    ``sizes`` and ``tensors`` are as ``"down"`` sees them; ``codes``: see the kernel.
    """
    longest, pixels = max(sizes.cross, sizes.lines), sizes.cross * sizes.lines
    batch, channels = limits.like or (sizes.batch, sizes.channels)
    rows = batch * channels
    if len(codes) == 1 or not limits.together or rows * longest > 2 * _MANY_LANES or rows * pixels > _MOST_TOGETHER:
        return None
    together = Sizes(sizes.batch * len(codes), sizes.channels, sizes.channels, longest, longest)
    layout, choice = (
        _Layout(one, tensors, itemsize, segment, 1 if padded else 4)
        for one in (sizes._replace(groups=sizes.channels), together)
    )
    for one in (layout, choice):
        if {*one.own.values()} != {CHANNEL}:
            # Both axes of the image are walked: it is contiguous along none of them.
            one.fast, one.align, one.own = NONE, 1, dict.fromkeys(one.own, NONE)
    chunks = _chunks(choice, proxy_channels, limits._replace(like=(batch * len(codes), channels)))
    if chunks.halo:
        return None
    blocks = (math.ceil(sizes.channels / chunks.rows(cross)) for cross in (sizes.cross, sizes.lines))
    of_rows = {
        "i_direction": None, "n_per_group": sizes.channels // sizes.groups, "n_chunks": None, "n_rows": None,
        "i_codes": sum(code << (2 * d) for d, code in enumerate(codes)),
        "s_out_direction": sizes.batch * sizes.channels * pixels, "n_images": sizes.batch,
    }  # fmt: skip
    plan = _plan_lanes(
        layout, chunks, proxy_channels, False, of_rows, PITCH=_power_of_two(math.ceil(longest / chunks.pixels)),
        WHOLE=not padded and sizes.cross % chunks.pixels == sizes.lines % chunks.pixels == 0, ADJOINT=adjoint,
        GATED=gated, PTX=limits.ptx, TOGETHER=True,
    )  # fmt: skip
    segmented = segment is not None and segment < longest
    return replace(
        plan, grid=(sizes.batch * max(blocks), len(codes)), constants={**plan.constants, "SEGMENTED": segmented},
        integers={**plan.integers, "n_runs": 1, "n_segment": segment if segmented else longest},
    )  # fmt: skip


def _plan_lanes(
    layout: _Layout, chunks: _Chunks, proxy_channels: int, reverse: bool, integers: Mapping[str, int | None],
    **constants: Any,
) -> Plan:  # fmt: skip
    """The part that plans of one direction and of several have in common."""
    lanes, group, pixels, halo = chunks
    # A lane takes as many lines together as it can load at once.
    lines = layout.align if layout.fast == LINE else 1
    blocks = _Blocks(chunks.rows(layout.sizes.cross), lanes * pixels, halo, lines)
    return layout.plan(
        blocks, lanes // 32, reverse, more=integers, LANES=lanes, GROUP=group, PIXELS=pixels,
        WIDTH=_width(layout, pixels), UNROLL=proxy_channels <= 16, S=proxy_channels, **constants,
    )  # fmt: skip
