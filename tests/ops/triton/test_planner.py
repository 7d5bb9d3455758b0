"""The rules that size a launch, which need neither a GPU nor triton."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gspn.ops.directions import DIRECTIONS, scan_axes
from gspn.ops.triton.planner import (
    CHANNEL,
    CROSS,
    LINE,
    Limits,
    Plan,
    Sizes,
    Strides,
    plan_line_scan,
    plan_propagate,
    plan_together,
)
from support import LAYOUTS, laid_out


def planned(
    shape: tuple[int, int, int, int],
    groups: int,
    direction: str,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    segment: int | None = None,
    backward: bool = False,
    memory: int = 227 * 1024,
) -> Plan:
    batch, channels, height, width = shape
    axes = scan_axes(direction)

    def empty(*size: int) -> torch.Tensor:
        if layout == "sliced":
            big = torch.empty([2 * n + 1 for n in size], dtype=dtype, device="meta")
            return big[tuple(slice(1, 2 * n + 1, 2) for n in size)]
        return laid_out(torch.empty(size, dtype=dtype, device="meta"), layout)

    x, taps = empty(*shape), empty(batch, groups, 3, height, width)

    def strides(t: torch.Tensor) -> Strides:
        tap = t.stride(2) if t.dim() == 5 else 0
        return Strides(t.stride(0), t.stride(1), t.stride(axes.cross), t.stride(axes.line), tap)

    names = ("grad", "h", "x", "taps", "lam", "dx", "dtaps", "dlam") if backward else ("x", "taps", "lam", "h")
    return plan_line_scan(
        Sizes(batch, channels, groups, shape[axes.cross], shape[axes.line]),
        tuple((name, strides(taps if "taps" in name else x)) for name in names),
        x.element_size(),
        reverse=axes.reverse,
        segment=segment,
        limits=Limits(memory),
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_plan_covers_its_work(direction, layout, backward) -> None:
    sizes, segments, memory = (1, 2, 7, 32, 56, 300, 1100, 5000), (None, 1, 7, 64), (99 * 1024, 227 * 1024)
    for cross, lines, segment, limit in itertools.product(sizes, (1, 3, 64, 200), segments, memory):
        for channels, groups in ((1, 1), (5, 5), (12, 4), (96, 1)):
            shape = (cross, lines) if direction in ("right", "left") else (lines, cross)
            if layout != "contiguous" and cross * lines > 20000:
                continue
            chosen = planned(
                (2, channels, *shape), groups, direction, layout=layout, segment=segment, backward=backward,
                memory=limit,
            )  # fmt: skip
            c, i = chosen.constants, chosen.integers
            unit = {axis: c["ALIGN"] if c["FAST"] == axis else 1 for axis in (CHANNEL, CROSS, LINE)}
            assert i["n_cross"] * unit[CROSS] == cross
            assert i["n_lines"] * unit[LINE] == lines
            assert i["n_channels"] * unit[CHANNEL] * (i["n_groups"] or 1) == channels
            run = i["n_run"] * unit[LINE]
            assert i["n_runs"] == math.ceil(lines / run)
            restart = min(segment or lines, lines)
            assert i["n_runs"] == 1 or run % restart == 0, "a program starts at a restart"
            assert chosen.grid == (2 * (i["n_groups"] or 1) * i["n_runs"] * chosen.channel_blocks,)
            assert chosen.channel_blocks * c["BLOCK_C"] >= i["n_channels"] * unit[CHANNEL]
            assert c["HALO"] == 0 or c["BLOCK_N"] > 2 * c["HALO"] >= 2 * c["LINES"]
            assert c["HALO"] > 0 or c["BLOCK_N"] >= cross
            assert c["HALO"] % c["LINES"] == 0
            assert c["LINES"] % c["GROUP"] == 0
            for name in ("BLOCK_C", "BLOCK_N", "LINES", "VECTOR", "ALIGN"):
                assert c[name] & (c[name] - 1) == 0, name
            assert chosen.num_warps in (1, 2, 4, 8, 16)
            assert chosen.shared_memory <= limit


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_enough_bytes_in_flight(direction, dtype, backward) -> None:
    # 128 planes on a card of 108 or more multiprocessors: each program has to fill one's share of the memory's latency.
    chosen = planned((16, 8, 1024, 1024), 8, direction, dtype, backward=backward)
    c = chosen.constants
    tile = (7 if backward else 5) * c["BLOCK_C"] * c["BLOCK_N"] * c["LINES"] * dtype.itemsize
    assert (c["STAGES"] - 1) * tile >= 48 * 1024
    along = c["LINES"] if direction in ("right", "left") else c["BLOCK_N"]
    assert along * dtype.itemsize >= 32, "a full sector of memory"


def test_channels_last_is_walked_along_the_channels() -> None:
    for direction in DIRECTIONS:
        chosen = planned((8, 96, 56, 56), 96, direction, layout="channels_last")
        assert chosen.constants["FAST"] == CHANNEL
        assert chosen.constants["ALIGN"] == 4
        assert chosen.constants["BLOCK_C"] >= 4


def test_constants_do_not_follow_sizes() -> None:
    first = planned((16, 8, 1024, 1024), 8, "down")
    other = planned((3, 7, 1000, 996), 7, "down")
    assert first.constants == other.constants
    assert first.num_warps == other.num_warps


def test_large_tensors_are_addressed_in_64_bits() -> None:
    assert not planned((1, 8, 1024, 1024), 8, "down").constants["WIDE"]
    assert planned((1, 64, 300, 40_000_000), 64, "right", layout="contiguous").constants["WIDE"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("states", [2, 8, 64])
def test_the_lanes_of_propagate_hold_whole_rows(direction, layout, states) -> None:
    axes = scan_axes(direction)
    for cross, channels, row in itertools.product((1, 2, 7, 56, 74, 147, 512, 1000, 5000), (1, 5, 96), (None, 64)):
        shape = (2, channels, 3, cross) if axes.line == -2 else (2, channels, cross, 3)
        x = laid_out(torch.empty(shape, device="meta"), layout)
        strides = Strides(x.stride(0), x.stride(1), x.stride(axes.cross), x.stride(axes.line))
        chosen = plan_propagate(
            Sizes(2, channels, channels, cross, 3), (("in", strides), ("out", strides)), 4, states,
            reverse=axes.reverse, segment=None, limits=Limits(row=row),
        )  # fmt: skip
        c, i = chosen.constants, chosen.integers
        lanes, group, pixels, halo = c["LANES"], c["GROUP"], c["PIXELS"], c["HALO"]
        assert lanes == 32 * chosen.num_warps
        assert group in (32, lanes)
        assert (i["n_chunks"] - 1) * pixels < cross <= i["n_chunks"] * pixels
        assert c["PITCH"] >= i["n_chunks"]
        assert c["WHOLE"] <= (cross % pixels == 0)
        assert (pixels if c["FAST"] != LINE else c["LINES"]) % c["WIDTH"] == 0
        if halo:
            assert halo % pixels == halo % c["LINES"] == 0
            assert lanes * pixels > 2 * halo
            assert chosen.states == (*chosen.grid, 2, 1, cross)
            rows = 1
        else:
            assert i["n_rows"] * i["n_chunks"] <= group
            rows = lanes // group * i["n_rows"]
        assert chosen.grid == (2 * math.ceil(channels / rows),)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_warps_with_tensor_cores_hold_whole_rows(direction, layout) -> None:
    axes, taken = scan_axes(direction), 0
    for cross, lines, channels, states, itemsize in itertools.product(
        (1, 7, 15, 74, 128, 129), (3, 64), (8, 97), (2, 8, 12, 16, 17), (2, 4)
    ):
        shape = (512, channels, lines, cross) if axes.line == -2 else (512, channels, cross, lines)
        x = laid_out(torch.empty(shape, device="meta"), layout)
        strides = Strides(x.stride(0), x.stride(1), x.stride(axes.cross), x.stride(axes.line))
        how = {"reverse": axes.reverse, "segment": None, "limits": Limits(tensor_cores=True)}
        call = Sizes(512, channels, channels, cross, lines), (("in", strides), ("out", strides)), itemsize, states
        plan = plan_propagate(*call, **how)
        c = plan.constants
        for adjoint in (False, True):
            scan = plan_propagate(*call, **how, gated=False, adjoint=adjoint).constants
            assert ("TILES" in scan) == ("TILES" in c)
            assert (scan["ADJOINT"], scan["GATED"]) == (adjoint, False)
        assert "TILES" not in plan_propagate(*call, **how, padded=True).constants
        assert "TILES" not in plan_propagate(*call, **how | {"limits": Limits()}).constants
        if "TILES" not in c:
            assert cross == 1 or cross > 128 or states in (12, 17) or channels == 8
            continue
        taken += 1
        assert cross <= 128
        assert states in (2, 8, 16)
        assert 8 * (c["TILES"] - 1) < cross <= 8 * c["TILES"]
        assert c["PARTS"] == math.ceil(states / 4) * (2 if itemsize == 4 else 1)
        assert c["WARPS"] == plan.num_warps
        assert plan.grid == (512 * math.ceil(channels / (8 * c["WARPS"])),)
        assert c["WIDTH"] == 1 or (c["FAST"] == CROSS and cross % 2 == 0)
        assert lines % c["LINES"] == 0
        assert c["LINES"] * c["TILES"] <= 20
    assert taken > 0


def test_few_rows_are_not_left_to_few_warps() -> None:
    def plan(batch: int, channels: int) -> Plan:
        image = Strides(channels * 128 * 128, 128 * 128, 1, 128)
        sizes, how = Sizes(batch, channels, channels, 128, 128), {"reverse": False, "segment": None}
        return plan_propagate(sizes, (("in", image), ("out", image)), 4, 8, limits=Limits(tensor_cores=True), **how)

    assert "TILES" in plan(32, 640).constants
    assert "TILES" not in plan(1, 640).constants


def test_directions_run_side_by_side_where_each_has_few_rows() -> None:
    def together(batch: int, channels: int, height: int, width: int, layout: str, **limits: bool) -> Plan | None:
        x = laid_out(torch.empty((batch, channels, height, width), device="meta"), layout)
        strides = Strides(x.stride(0), x.stride(1), x.stride(3), x.stride(2))
        sizes = Sizes(batch, channels, channels, width, height)
        how = {"segment": None, "limits": Limits(**limits)}
        return plan_together(sizes, (("in", strides), ("out", strides)), 4, 8, (0, 1, 2, 3), **how)

    for layout in ("contiguous", "channels_last", "transposed"):
        assert together(64, 96, 56, 56, layout) is None
        assert together(1, 320, 128, 128, layout) is None, "float32 copies of a large image"
        assert together(1, 1, 1, 5000, layout) is None, "rows of several blocks"
        assert together(2, 320, 64, 64, layout, together=False) is None
        for batch, channels, height, width in ((2, 320, 64, 64), (1, 640, 32, 32), (3, 5, 1, 1), (2, 7, 74, 9)):
            chosen = together(batch, channels, height, width, layout)
            assert chosen is not None
            c = chosen.constants
            for cross in (height, width):
                chunks = math.ceil(cross / c["PIXELS"])
                assert chunks <= min(c["GROUP"], c["PITCH"])
                rows = c["LANES"] // c["GROUP"] * (c["GROUP"] // chunks)
                assert chosen.grid[0] >= batch * math.ceil(channels / rows)
            assert chosen.grid[1] == 4
            assert chosen.integers["i_codes"] == 0b11100100


def test_few_lanes_of_propagate_are_idle() -> None:
    for cross, most in ((74, 0.08), (147, 0.1), (56, 0.0), (28, 0.0), (14, 0.0), (512, 0.0), (1024, 0.0)):
        size = Strides(4608 * cross * cross, cross * cross, 1, cross)
        sizes = Sizes(32, 4608, 4608, cross, cross)
        how = dict(reverse=False, segment=None, limits=Limits())
        chosen = plan_propagate(sizes, (("in", size), ("out", size)), 4, 8, **how)
        c = chosen.constants
        useful = c["LANES"] // c["GROUP"] * chosen.integers["n_rows"] * cross
        assert 1 - useful / (c["LANES"] * c["PIXELS"]) <= most, cross


def test_a_small_call_takes_the_plan_of_a_large_one() -> None:
    pytest.importorskip("triton")
    from gspn.ops.triton.launch import limits_of, planned

    def plan(batch: int, channels: int) -> Plan:
        image = Strides(channels * 49, 49, 1, 7)
        sizes, how = Sizes(batch, channels, channels, 7, 7), dict(reverse=False, segment=None)
        limits = limits_of(torch.device("cpu"))
        scan = plan_line_scan(
            sizes, tuple((name, image) for name in ("x", "taps", "lam", "h")), 4, limits=limits, **how
        )
        lanes = plan_propagate(sizes, (("in", image), ("out", image)), 4, 8, limits=limits, **how)
        return scan, lanes

    large, small = plan(64, 768), plan(2, 48)
    assert [one.constants for one in large] != [one.constants for one in small]
    with planned((64, 768)):
        forced = plan(2, 48)
    assert [one.constants for one in forced] == [one.constants for one in large]
    assert [one.grid for one in forced] != [one.grid for one in large]
    assert plan(2, 48) == small


def test_choices_replace_the_rules() -> None:
    pytest.importorskip("triton")
    from gspn.ops.triton.launch import limits_of, planned

    with planned(None, stages=3, num_warps=2):
        chosen = plan_line_scan(*CALL, 4, reverse=False, segment=None, limits=limits_of(torch.device("cpu")))
    assert (chosen.constants["STAGES"], chosen.num_warps) == (3, 2)
    how = dict(reverse=False, segment=None)
    scan = Sizes(2, 8, 8, 74, 74), (("in", CALL[1][0][1]), ("out", CALL[1][0][1])), 4, 8
    with planned(None, lanes=64, group=32, pixels=5):
        chosen = plan_propagate(*scan, limits=limits_of(torch.device("cpu")), **how)
    assert (chosen.constants["LANES"], chosen.constants["PIXELS"], chosen.num_warps) == (64, 5, 2)
    with planned(None, lanes=64, group=32, pixels=2), pytest.raises(ValueError, match="no room for a row of 74"):
        plan_propagate(*scan, limits=limits_of(torch.device("cpu")), **how)


CALL = (
    Sizes(2, 8, 8, 74, 74),
    tuple((name, Strides(8 * 74 * 74, 74 * 74, 1, 74, 8 * 74 * 74)) for name in ("x", "taps", "lam", "h")),
)
