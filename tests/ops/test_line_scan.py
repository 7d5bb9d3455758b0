"""Every implementation that runs on the CPU, forward and every gradient, against the specification."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gspn
from support import (
    CPU_IMPLS,
    DTYPES,
    LAYOUTS,
    ROOT,
    SEGMENTS,
    SHAPES,
    assert_as_exact_as_pytorch,
    make_inputs,
    scan_and_gradients,
)  # fmt: skip

MIXED = [*LAYOUTS, "expanded_channels"]
FAST_IMPLS = [impl for impl in CPU_IMPLS if impl != "reference"]


def check(impl: str, tensors: tuple, direction: str, segment: int | None, with_lam: bool = True) -> None:
    x, taps, lam, grad = tensors
    lam = lam if with_lam else None
    h = gspn.line_scan(x, taps, lam, direction=direction, segment=segment, impl="reference")
    arguments = {"direction": direction, "segment": segment}
    actual = scan_and_gradients(x, taps, lam, grad, h=h, impl=impl, **arguments)
    plain = scan_and_gradients(x, taps, lam, grad, h=h, impl="reference", **arguments)
    doubles = [None if t is None else t.double() for t in (x, taps, lam, grad)]
    exact = scan_and_gradients(*doubles, h=h.double(), impl="reference", **arguments)
    absolute = [None if t is None else t.abs() for t in doubles]
    magnitude = scan_and_gradients(*absolute, impl="reference", **arguments)
    for name in plain:
        assert_as_exact_as_pytorch(actual[name], plain[name], exact[name], magnitude[name], name)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segment", SEGMENTS)
def test_sizes_and_segments(impl, direction, shape, segment) -> None:
    check(impl, make_inputs(2, 3, *shape, 3, torch.float32), direction, segment)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [40, 20, 4, 1])
def test_layouts_dtypes_and_groups(impl, direction, dtype, layout, groups) -> None:
    check(impl, make_inputs(2, 40, 6, 19, groups, dtype, layout=layout), direction, 4)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_lam", [True, False])
def test_blocks_of_channels(impl, direction, layout, with_lam) -> None:
    # More channels than one item of work takes, for per-channel and for shared taps (their gradients in parts).
    for groups in (72, 1):
        check(impl, make_inputs(1, 72, 5, 9, groups, torch.float32, layout=layout), direction, None, with_lam)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("segment", [None, 7])
def test_more_lines_than_a_tile(impl, direction, segment) -> None:
    check(impl, make_inputs(1, 2, 150, 150, 2, torch.float32), direction, segment)
    check(impl, make_inputs(1, 2, 150, 150, 1, torch.bfloat16), direction, segment)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("width", [512, 509])
def test_maps_beyond_the_caches(impl, direction, width) -> None:
    # Large outputs are written around the caches; an odd width puts every line at another alignment.
    check(impl, make_inputs(1, 16, 300, width, 16, torch.float32), direction, None)


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("layouts", [(a, b) for a in MIXED for b in MIXED if a != b], ids="-".join)
def test_mixed_layouts(impl, layouts) -> None:
    first, second = layouts
    x, _, lam, _ = make_inputs(2, 8, 9, 18, 8, torch.float32, layout=first)
    _, taps, _, grad = make_inputs(2, 8, 9, 18, 8, torch.float32, layout=second)
    for direction in ("down", "left"):
        check(impl, (x, taps, lam, grad), direction, None)


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


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_element_is_written(impl, direction, dtype, layout, monkeypatch) -> None:
    # Outputs come from empty memory; filled with NaN, an element that is left out shows.
    plain_empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain_empty_like(*a, **k).fill_(float("nan")))
    for groups in (40, 1):
        x, taps, lam, grad = make_inputs(1, 40, 5, 19, groups, dtype, layout=layout)
        for segment in (None, 2):
            results = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=segment, impl=impl)
            assert all(r.isfinite().all() for r in results.values())


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_the_other_instruction_sets(isa) -> None:
    # The instruction set is chosen once, when the kernels load: a lower one needs a process of its own.
    from gspn.ops.cpu.library import isa as current

    if current() == "baseline" or current() == isa:
        pytest.skip(f"this processor runs {current()} already")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         "-k", "(sizes or layouts or blocks or tile or beyond) and not instruction"],
        env=os.environ | {"GSPN_ISA": isa}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
