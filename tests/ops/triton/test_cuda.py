"""The Triton kernels on a CUDA device: against the specification, captured in a graph, and on a device not current."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import gspn
from support import assert_as_exact_as_pytorch, laid_out, make_inputs, scan_and_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

SHAPES = [(1, 1), (1, 5), (7, 1), (14, 14), (56, 56), (33, 250), (65, 600), (600, 65), (257, 1024), (12, 4500)]
DTYPES = [torch.bfloat16, torch.float16]


def check(tensors, direction: str, segment: int | None, with_lam: bool = True) -> None:
    x, taps, lam, grad = (t if t.is_cuda else t.cuda() for t in tensors)
    lam = lam if with_lam else None
    arguments = {"direction": direction, "segment": segment}
    h = torch.ops.gspn.line_scan(x, taps, lam, direction, segment, "reference")
    actual = scan_and_gradients(x, taps, lam, grad, h=h, impl="triton", **arguments)
    plain = scan_and_gradients(x, taps, lam, grad, h=h, impl="reference", **arguments)
    doubles = [None if t is None else t.double() for t in (x, taps, lam, grad)]
    exact = scan_and_gradients(*doubles, h=h.double(), impl="reference", **arguments)
    magnitude = scan_and_gradients(*(None if t is None else t.abs() for t in doubles), impl="reference", **arguments)
    for name in plain:
        assert_as_exact_as_pytorch(actual[name], plain[name], exact[name], magnitude[name], name)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("segment", [None, 2, 7])
def test_sizes_and_segments(direction, shape, segment) -> None:
    check(make_inputs(2, 3, *shape, 3, torch.float32), direction, segment)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 48), (272, 300), (28, 1100)], ids=str)
@pytest.mark.parametrize("groups", [32, 4, 1])
def test_dtypes_and_groups(direction, dtype, shape, groups) -> None:
    check(make_inputs(2, 32, *shape, groups, dtype), direction, None)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("layout", ["channels_last", "channels_last_taps_inner", "sliced", "expanded", "transposed"])
@pytest.mark.parametrize("shape", [(20, 24), (300, 9), (9, 300)], ids=str)
def test_layouts(direction, layout, shape) -> None:
    tensors = [t.cuda() for t in make_inputs(2, 24, *shape, 24, torch.float32)]
    check([laid_out(t, layout) if layout != "sliced" else _sliced(t) for t in tensors], direction, 6)
    check([laid_out(t, layout) if layout != "sliced" else _sliced(t) for t in tensors], direction, None, with_lam=False)


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    big = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
    view = big[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_the_same_bits_every_time(direction) -> None:
    # A race between the threads of a program, or between its rounds over a long row, would show as a difference.
    x, taps, lam, grad = (t.cuda() for t in make_inputs(2, 8, 1024, 1024, 8, torch.float32))
    arguments = {"direction": direction, "segment": None, "impl": "triton"}
    first = scan_and_gradients(x, taps, lam, grad, **arguments)
    for _ in range(20):
        again = scan_and_gradients(x, taps, lam, grad, **arguments)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("groups", [8, 1])
@pytest.mark.parametrize("direction", ["down", "left"])
def test_cuda_graph(direction, groups) -> None:
    tensors = [t.cuda() for t in make_inputs(2, 8, 64, 600, groups, torch.float32)]
    arguments = {"direction": direction, "segment": None, "impl": "triton"}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        scan_and_gradients(*tensors, **arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scan_and_gradients(*tensors, **arguments)
    fresh = [t.cuda() for t in make_inputs(2, 8, 64, 600, groups, torch.float32, seed=1)]
    for held, new in zip(tensors, fresh, strict=True):
        held.copy_(new)
    graph.replay()
    expected = scan_and_gradients(*fresh, **arguments)
    for name in expected:
        torch.testing.assert_close(captured[name], expected[name], rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current() -> None:
    tensors = make_inputs(2, 4, 32, 32, 4, torch.float32)
    arguments = {"direction": "down", "segment": None, "impl": "triton"}
    with torch.cuda.device(0):
        there = scan_and_gradients(*(t.to("cuda:1") for t in tensors), **arguments)
        here = scan_and_gradients(*(t.to("cuda:0") for t in tensors), **arguments)
    for name in here:
        assert there[name].device.index == 1
        assert torch.equal(there[name].cpu(), here[name].cpu())


def test_the_automatic_choice_is_triton() -> None:
    assert gspn.available_impls(torch.zeros(1, device="cuda"))["triton"] is None
