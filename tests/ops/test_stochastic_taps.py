"""Taps are averages over the neighbours that exist, for logits of any size, with gradients of every order."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gspn
from support import SHAPES


def by_definition(logits: torch.Tensor, direction: str) -> torch.Tensor:
    gate = logits.sigmoid()
    cross = -1 if direction in ("down", "up") else -2
    gate.select(2, 0).select(cross, 0).zero_()
    gate.select(2, 2).select(cross, -1).zero_()
    return gate / gate.sum(2, keepdim=True)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(direction, shape) -> None:
    logits = 3 * torch.randn(2, 4, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(gspn.stochastic_taps(logits, direction=direction), by_definition(logits, direction))


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_to_one(direction, dtype) -> None:
    taps = gspn.stochastic_taps((10 * torch.randn(2, 4, 3, 9, 7)).to(dtype), direction=direction)
    assert taps.dtype == dtype
    assert (taps >= 0).all()
    # Three taps, each rounded once.
    assert (taps.double().sum(2) - 1).abs().max() <= 1.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once_at_the_end(dtype) -> None:
    logits = (10 * torch.randn(2, 4, 3, 9, 7)).to(dtype)
    taps = gspn.stochastic_taps(logits, direction="down")
    assert torch.equal(taps, gspn.stochastic_taps(logits.float(), direction="down").to(dtype))


@pytest.mark.parametrize("value", [-1e4, -200.0, 200.0, 1e4])
def test_extreme_logits_stay_finite(value) -> None:
    # The sigmoid of -200 is 0 in float32; the quotient of two such sigmoids is not.
    logits = torch.full((1, 1, 3, 4, 5), value, requires_grad=True)
    taps = gspn.stochastic_taps(logits, direction="down")
    torch.testing.assert_close(taps, by_definition(torch.zeros(1, 1, 3, 4, 5), "down"))
    (grad,) = torch.autograd.grad(taps[:, :, 0].sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_infinite_logits_are_limits(direction, dtype) -> None:
    inf, far = float("inf"), 1e4
    cases = [
        ((-inf, -inf, -inf), (-far, -far, -far)), ((-inf, 0.5, -inf), (-far, 0.5, -far)),
        ((-inf, -inf, 1), (-far, -far, 1)), ((inf, 0.5, -2), (far, 0.5, -2)), ((inf, inf, inf), (far, far, far)),
        ((inf, -inf, inf), (far, -far, far)),
    ]  # fmt: skip
    weight = torch.randn(1, len(cases), 3, 4, 5).to(dtype)
    results = []
    for side in (0, 1):
        rows = torch.tensor([case[side] for case in cases], dtype=dtype)
        logits = rows.view(1, -1, 3, 1, 1).repeat(1, 1, 1, 4, 5).requires_grad_()
        taps = gspn.stochastic_taps(logits, direction=direction)
        results.append((taps, *torch.autograd.grad(taps, logits, weight)))
        assert torch.equal(torch.compile(gspn.stochastic_taps, backend="aot_eager")(logits, direction=direction), taps)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.isfinite().all()


def test_missing_neighbours_are_not_read_and_get_no_gradient() -> None:
    logits = torch.randn(1, 1, 3, 4, 5)
    poisoned = logits.clone()
    poisoned[:, :, 0, :, 0] = float("nan")
    poisoned[:, :, 2, :, -1] = float("inf")
    poisoned.requires_grad_()
    taps = gspn.stochastic_taps(poisoned, direction="down")
    assert torch.equal(taps, gspn.stochastic_taps(logits, direction="down"))
    (grad,) = torch.autograd.grad(taps.pow(2).sum(), poisoned)
    assert grad.isfinite().all()
    assert not grad[:, :, 0, :, 0].any()
    assert not grad[:, :, 2, :, -1].any()


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_derivatives(direction) -> None:
    logits = torch.randn(1, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a: gspn.stochastic_taps(a, direction=direction), logits)
    assert gradgradcheck(lambda a: gspn.stochastic_taps(a, direction=direction), logits)


def test_keeps_the_memory_layout() -> None:
    # A convolution in channels_last gives logits with the taps innermost; a scan walks them as they are.
    logits = torch.randn(2, 12, 5, 6).contiguous(memory_format=torch.channels_last).unflatten(1, (4, 3))
    assert gspn.stochastic_taps(logits, direction="down").stride() == logits.stride()


def test_empty() -> None:
    for shape in [(0, 1, 3, 4, 5), (1, 1, 3, 0, 5), (1, 1, 3, 4, 0), (1, 0, 3, 4, 5)]:
        assert gspn.stochastic_taps(torch.zeros(shape), direction="down").shape == shape
