"""The CPU kernels with every instruction set, forward and every gradient, against the specification."""

from __future__ import annotations

import itertools

import pytest
import torch

import gspn
from gspn.ops.cpu import instruction_set, instruction_sets
from support import (
    CPU_IMPLS,
    DTYPES,
    LAYOUTS,
    SEGMENTS,
    SHAPES,
    check_line_scan,
    every_pair,
    make_inputs,
    scan_and_gradients,
    threads,
)  # fmt: skip

MIXED = [*LAYOUTS, "expanded_channels"]


@every_pair(direction=gspn.DIRECTIONS, shape=SHAPES, segment=SEGMENTS)
def test_sizes_and_segments(direction, shape, segment) -> None:
    check_line_scan(make_inputs(2, 3, *shape, 3, torch.float32), direction, segment)


@every_pair(direction=gspn.DIRECTIONS, dtype=DTYPES, layout=LAYOUTS, groups=[40, 20, 4, 1])
def test_layouts_dtypes_and_groups(direction, dtype, layout, groups) -> None:
    check_line_scan(make_inputs(2, 40, 6, 19, groups, dtype, layout=layout), direction, 4)


@every_pair(direction=gspn.DIRECTIONS, layout=["contiguous", "channels_last"], with_lam=[True, False], groups=[72, 1])
def test_blocks_of_channels(direction, layout, with_lam, groups) -> None:
    # More channels than one item of work takes, for per-channel and for shared taps (their gradients in parts).
    check_line_scan(make_inputs(1, 72, 5, 9, groups, torch.float32, layout=layout), direction, None, with_lam)


@every_pair(direction=gspn.DIRECTIONS, segment=[None, 7], kind=[(2, torch.float32), (1, torch.bfloat16)])
def test_more_lines_than_a_tile(direction, segment, kind) -> None:
    groups, dtype = kind
    check_line_scan(make_inputs(1, 2, 150, 150, groups, dtype), direction, segment)


@pytest.mark.slow
@every_pair(direction=gspn.DIRECTIONS, width=[512, 509])
def test_maps_beyond_the_caches(direction, width) -> None:
    # Large outputs are written around the caches; an odd width puts every line at another alignment.
    with threads(2):
        check_line_scan(make_inputs(1, 16, 300, width, 16, torch.float32), direction, None)


@pytest.mark.parametrize(
    ("first", "second", "direction"),
    [(a, b, ("down", "left")[(i + j) % 2]) for i, a in enumerate(MIXED) for j, b in enumerate(MIXED) if a != b],
)
def test_mixed_layouts(first, second, direction) -> None:
    x, _, lam, _ = make_inputs(2, 8, 9, 18, 8, torch.float32, layout=first)
    _, taps, _, grad = make_inputs(2, 8, 9, 18, 8, torch.float32, layout=second)
    check_line_scan((x, taps, lam, grad), direction, None)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_maps(impl, shape) -> None:
    batch, _, height, width = shape
    x = torch.zeros(shape, requires_grad=True)
    taps = torch.zeros(batch, 1, 3, height, width, requires_grad=True)
    for direction in gspn.DIRECTIONS:
        h = gspn.line_scan(x, taps, x, direction=direction, impl=impl)
        assert h.shape == x.shape
        dx, dtaps = torch.autograd.grad(h.sum(), (x, taps))
        assert dx.shape == x.shape
        assert dtaps.shape == taps.shape
        assert not dtaps.any()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_not_written_to(impl, layout) -> None:
    tensors = make_inputs(2, 8, 7, 18, 8, torch.float32, layout=layout)
    before = [t.clone() for t in tensors]
    for direction in gspn.DIRECTIONS:
        x, taps, lam, grad = tensors
        scan_and_gradients(x, taps, lam, grad, direction=direction, segment=3, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@every_pair(direction=gspn.DIRECTIONS, dtype=[torch.float32, torch.bfloat16], layout=LAYOUTS)
def test_every_output_element_is_written(direction, dtype, layout, monkeypatch) -> None:
    # Outputs come from empty memory; filled with NaN, an element that is left out shows.
    plain_empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain_empty_like(*a, **k).fill_(float("nan")))
    for groups in (40, 1):
        x, taps, lam, grad = make_inputs(1, 40, 5, 19, groups, dtype, layout=layout)
        for isa, segment in itertools.product(instruction_sets(), (None, 2)):
            with instruction_set(isa):
                results = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=segment, impl="cpu")
            assert all(r.isfinite().all() for r in results.values()), isa
