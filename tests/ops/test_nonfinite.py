"""NaN and inf stay where they belong: in the cone of the pixel they are at, and nowhere if nothing reads them."""

from __future__ import annotations

import pytest
import torch

import gspn
from support import CPU_IMPLS, every_pair, make_inputs, scan_and_gradients


def cone(direction: str, height: int, width: int, at: tuple[int, int], segment: int | None) -> torch.Tensor:
    """The pixels whose state takes something from pixel ``at``."""
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    line, across = (i - at[0], (j - at[1]).abs()) if direction in ("down", "up") else (j - at[1], (i - at[0]).abs())
    step = -line if direction in ("up", "left") else line
    inside = (step >= 0) & (across <= step)
    if segment is not None:
        axis, size = (i, height) if direction in ("down", "up") else (j, width)
        number = (size - 1 - axis if direction in ("up", "left") else axis) // segment
        inside &= number == number[at]
    return inside


@every_pair(
    impl=CPU_IMPLS,
    direction=gspn.DIRECTIONS,
    layout=["contiguous", "channels_last"],
    groups=[20, 1],
    segment=[None, 4],
    bad=[float("nan"), float("inf")],
)
def test_a_bad_pixel_stays_in_its_cone(impl, direction, layout, groups, segment, bad) -> None:
    x, taps, lam, _ = make_inputs(2, 20, 11, 19, groups, torch.float32, layout=layout)
    taps = taps.abs() + 0.01
    x[1, 3, 5, 8] = bad
    h = gspn.line_scan(x, taps, lam, direction=direction, segment=segment, impl=impl)
    expected = torch.zeros(2, 20, 11, 19, dtype=torch.bool)
    expected[1, 3] = cone(direction, 11, 19, (5, 8), segment)
    assert torch.equal(~h.isfinite(), expected)


@every_pair(
    impl=CPU_IMPLS,
    direction=gspn.DIRECTIONS,
    layout=["contiguous", "channels_last"],
    groups=[20, 1],
    segment=[None, 3],
    shape=[(11, 19), (1, 1), (6, 1), (1, 6)],
    dtype=[torch.float32, torch.bfloat16],
)
def test_taps_of_neighbours_that_do_not_exist_are_not_read(
    impl, direction, layout, groups, segment, shape, dtype
) -> None:
    # Beyond the ends of a line, and before the first line of a segment, there is nothing to weigh.
    tensors = make_inputs(1, 20, *shape, groups, dtype, layout=layout)
    x, taps, lam, grad = tensors
    missing = torch.zeros(1, 1, 3, *shape, dtype=torch.bool)
    line, cross = (3, 4) if direction in ("down", "up") else (4, 3)
    missing.select(2, 0).select(cross - 1, 0).fill_(True)
    missing.select(2, 2).select(cross - 1, -1).fill_(True)
    count = missing.shape[line]
    for step in range(0, count, segment or count):
        missing.select(line, count - 1 - step if direction in ("up", "left") else step).fill_(True)
    poisoned = torch.empty_like(taps).copy_(taps.masked_fill(missing, float("nan")))
    clean = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=segment, impl=impl)
    actual = scan_and_gradients(x, poisoned, lam, grad, direction=direction, segment=segment, impl=impl)
    for name in clean:
        assert torch.equal(actual[name], clean[name]), name
    assert not actual["dtaps"][missing.expand_as(taps)].any()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("groups", [4, 1])
def test_a_bad_gradient_does_not_touch_taps_that_reach_outside(impl, direction, groups) -> None:
    x, taps, lam, grad = make_inputs(1, 4, 6, 7, groups, torch.float32)
    grad = torch.full_like(grad, float("nan"))
    dtaps = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=None, impl=impl)["dtaps"]
    line, cross = (3, 4) if direction in ("down", "up") else (4, 3)
    first = -1 if direction in ("up", "left") else 0
    assert not dtaps.select(line, first).any()
    assert not dtaps.select(2, 0).select(cross - 1, 0).any()
    assert not dtaps.select(2, 2).select(cross - 1, -1).any()
