"""The Stability-Context Condition as a test: averages along every path, bounded states, dense reach."""

from __future__ import annotations

import pytest
import torch

import gspn
from support import CPU_IMPLS


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_the_state_is_bounded_by_the_lines_scanned(impl, direction) -> None:
    # |h_i| <= sum_{j <= i} max |lam_j x_j| <= (i + 1) max |x|, and lam = x = 1 reaches it exactly.
    torch.manual_seed(0)
    x = torch.randn(1, 3, 300, 300)
    taps = gspn.stochastic_taps(4 * torch.randn(1, 3, 3, 300, 300), direction=direction)
    h = gspn.line_scan(x, taps, direction=direction, impl=impl)
    step = torch.arange(1.0, 301.0)
    step = step.flip(0) if direction in ("up", "left") else step
    bound = (step.view(-1, 1) if direction in ("down", "up") else step.view(1, -1)) * x.abs().max()
    assert (h.abs() <= bound).all()
    ones = gspn.line_scan(torch.ones_like(x), taps, direction=direction, impl=impl)
    exact = bound / x.abs().max()
    torch.testing.assert_close(ones, exact.expand_as(ones), rtol=300 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_four_directions_connect_each_pixel_with_every_other(impl) -> None:
    torch.manual_seed(0)
    height, width = 7, 10
    pixels = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    reached = 0
    for direction in gspn.DIRECTIONS:
        logits = torch.randn(1, 1, 3, height, width, dtype=torch.float64).expand(height * width, -1, -1, -1, -1)
        taps = gspn.stochastic_taps(logits, direction=direction)
        reached = reached + gspn.line_scan(pixels, taps, direction=direction, impl=impl)
    assert (reached > 0).all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_each_line_keeps_the_mass_of_a_source_line(impl, direction) -> None:
    # An impulse's weights W_ij sum to one over the source line: summing the rows of G that belong to one source line.
    torch.manual_seed(0)
    size = 12
    taps = gspn.stochastic_taps(torch.randn(1, 1, 3, size, size, dtype=torch.float64), direction=direction)
    first = -1 if direction in ("up", "left") else 0
    x = torch.zeros(1, 1, size, size, dtype=torch.float64)
    x.select(2 if direction in ("down", "up") else 3, first).fill_(1)
    h = gspn.line_scan(x, taps, direction=direction, impl=impl)
    torch.testing.assert_close(h, torch.ones_like(h))
