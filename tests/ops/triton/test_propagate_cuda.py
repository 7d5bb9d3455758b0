"""The Triton kernels of propagate on a CUDA device: against the specification, in a graph, on a device not current."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import gspn

sys.path.append(str(Path(__file__).parent))

from propagate_support import check, make_arguments

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def on(device: str, arguments: tuple) -> tuple:
    return tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments)


@pytest.fixture(autouse=True)
def _plain_float32():
    # cuDNN's convolutions in TF32 would make the bound, which is a multiple of PyTorch's own error, far too wide.
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def forward(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment):
    arguments = x, proxy, tap_proj, lam_proj, u_proj, skip_proj, ",".join(directions), segment
    return torch.ops.gspn.propagate(*arguments, "triton"), arguments


def results(grad, *arguments) -> list:
    y, arguments = forward(*arguments)
    return [y, *torch.ops.gspn.propagate_backward(grad, *arguments, "triton")]


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (14, 14), (33, 250), (65, 1300), (1300, 65)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_sizes_and_layouts(shape, layout) -> None:
    for segment in (None, 5):
        check(*on("cuda", make_arguments(2, 6, *shape, 3, 2, layout=layout, segment=segment)))


@pytest.mark.parametrize("states", [1, 2, 5, 8, 16, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_groups_and_dtypes(states, dtype) -> None:
    for groups in (1, 16, 32):
        check(*on("cuda", make_arguments(2, 32, 28, 36, states, groups, dtype)))


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_large_logits(scale, sign) -> None:
    check(*on("cuda", make_arguments(2, 8, 20, 24, 4, 8, logits=scale, sign=sign)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(96, 56, 56), (8, 300, 1100)], ids=str)
def test_the_same_bits_every_time(size, layout) -> None:
    # A race between the threads of a program, or between its rounds over a long row, would show as a difference.
    arguments = on("cuda", make_arguments(4, *size, 8, 1, layout=layout))
    first = results(*arguments)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(results(*arguments), first, strict=True))


def test_cuda_graph() -> None:
    arguments = on("cuda", make_arguments(2, 8, 64, 60, 4, 2))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        results(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(*arguments)
    fresh = on("cuda", make_arguments(2, 8, 64, 60, 4, 2, seed=1))
    for held, new in zip(arguments[:7], fresh[:7], strict=True):
        held.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, results(*fresh), strict=True))


def test_no_map_is_written() -> None:
    # Half types keep a sum in float32 beside the result; the maps would take 20 times the memory of x.
    arguments = on("cuda", make_arguments(4, 64, 128, 128, 4, 64))
    size = arguments[1].numel() * 4
    for call, most in (
        (lambda: forward(*arguments[1:]), 1.3),
        (lambda: results(*arguments), 5),
    ):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before < most * size


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current() -> None:
    arguments = make_arguments(2, 4, 32, 32, 3, 4)
    with torch.cuda.device(0):
        there, here = results(*on("cuda:1", arguments)), results(*on("cuda:0", arguments))
    for a, b in zip(there, here, strict=True):
        assert a.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


def test_the_automatic_choice_is_triton() -> None:
    assert gspn.available_impls(torch.zeros(1, device="cuda"), op="propagate")["triton"] is None
