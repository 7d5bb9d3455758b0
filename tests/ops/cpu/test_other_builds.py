"""The kernels of Clang, and those for aarch64 under an emulator, against the specification, as the installed ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gspn
import other_builds
from gspn.ops.cpu import instruction_sets
from propagate_cases import ALL, check_propagate, in_doubles, make_arguments
from support import DTYPES, LAYOUTS, check_line_scan, every_pair, make_inputs, threads
from valid_size_cases import alone, poisoned, random_sizes

# What is built and how long it takes is in other_builds.py.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["clang", "aarch64"], autouse=True)
def kernels(request) -> Iterator[Any]:
    if reason := other_builds.why_not(request.param):
        pytest.skip(reason)
    library = other_builds.open_build(request.param)
    with other_builds.in_place(library):
        assert instruction_sets() == ("baseline",)
        yield library
    if isinstance(library, other_builds.ServedLibrary):
        library.close()


@every_pair(dtype=DTYPES, layout=LAYOUTS, shape=[(9, 6), (17, 35), (1, 5), (33, 16)], groups=[8, 2, 1])
def test_line_scan(dtype, layout, shape, groups) -> None:
    tensors = make_inputs(2, 8, *shape, groups, dtype, layout=layout)
    for direction, segment in zip(gspn.DIRECTIONS, (None, 3, None, 2), strict=True):
        check_line_scan(tensors, direction, segment)


@every_pair(
    dtype=DTYPES,
    layout=["contiguous", "channels_last", "sliced", "expanded"],
    states=[1, 2, 4, 8, 16, 20],
    channels_groups=[(16, 16), (40, 20), (24, 2), (5, 1)],
)
def test_propagate(dtype, layout, states, channels_groups) -> None:
    channels, groups = channels_groups
    check_propagate(*make_arguments(2, channels, 7, 18, states, groups, dtype, layout=layout), 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_several_sizes(dtype) -> None:
    sizes = random_sizes(6, 7, 18)
    (x, proxy, *rest), _ = make_arguments(6, 20, 7, 18, 3, 20, dtype)
    maps = poisoned((x, proxy), sizes, float("nan"))

    def results(x: torch.Tensor, proxy: torch.Tensor, valid_size: Any = None) -> dict[str, torch.Tensor]:
        x, proxy = x.requires_grad_(), proxy.requires_grad_()
        y = torch.ops.gspn.propagate(x, proxy, *rest, ALL, 5, "cpu", valid_size)
        dx, dproxy = torch.autograd.grad(y.square().sum(), (x, proxy))
        return {"y": y.detach(), "dx": dx, "dproxy": dproxy}

    together = results(*maps, torch.tensor(sizes))
    for name, expected in alone(results, (x.detach(), proxy.detach()), sizes).items():
        if name == "dproxy":  # its sums are in another order
            torch.testing.assert_close(together[name], expected)
        else:
            assert torch.equal(together[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype) -> None:
    # Out of the range of the fast taps, so that the safe ones are taken.
    arguments, _ = make_arguments(1, 20, 6, 18, 2, 20, dtype, logits=300.0)
    y = torch.ops.gspn.propagate(*arguments, ALL, None, "cpu")
    exact = torch.ops.gspn.propagate(*in_doubles(arguments), ALL, None, "reference")
    assert (y - exact).abs().max() <= 300 * torch.finfo(dtype).eps * exact.abs().max()


def test_every_half_survives_a_scan_unchanged() -> None:
    # One line and no taps: h = x, loaded, widened, narrowed and stored, NaNs, infinities and subnormal numbers too.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype).view(1, 1, 1, -1)
        h = gspn.line_scan(x, torch.zeros(1, 1, 3, *x.shape[2:], dtype=dtype), direction="down", impl="cpu")
        same = (h.view(torch.int16) == x.view(torch.int16)) | (h.isnan() & x.isnan())
        assert same.all(), f"{dtype}: {x[~same][:8]} became {h[~same][:8]}"


def test_threads_of_its_own_give_the_same_bits() -> None:
    (x, proxy, *rest), _ = make_arguments(2, 40, 9, 11, 4, 40, torch.float32)
    alone = gspn.ops.cpu.propagate.propagate(x, proxy, *rest, gspn.DIRECTIONS, None)
    with threads(3):
        assert torch.equal(gspn.ops.cpu.propagate.propagate(x, proxy, *rest, gspn.DIRECTIONS, None), alone)
