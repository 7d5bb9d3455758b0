"""The specification itself, against the explicit matrix and against autograd, in float64."""

from __future__ import annotations

import torch

import gspn
from gspn.analysis import affinity_matrix
from gspn.ops import reference
from support import SEGMENTS, every_pair, make_inputs


@every_pair(
    direction=gspn.DIRECTIONS, shape=[(1, 1), (1, 5), (5, 1), (4, 3), (3, 6)], segment=SEGMENTS, groups=[4, 2, 1]
)
def test_scan_is_the_explicit_matrix(direction, shape, segment, groups) -> None:
    x, taps, lam, _ = make_inputs(2, 4, *shape, groups, torch.float64)
    h = gspn.line_scan(x, taps, lam, direction=direction, segment=segment, impl="reference")
    matrix = affinity_matrix(taps, lam, direction, segment)
    torch.testing.assert_close(h.flatten(2), (matrix @ x.flatten(2).unsqueeze(-1)).squeeze(-1))


@every_pair(direction=gspn.DIRECTIONS, shape=[(1, 1), (1, 4), (4, 1), (5, 3)], segment=SEGMENTS, with_lam=[True, False])
def test_backward_is_what_autograd_finds_in_the_loop(direction, shape, segment, with_lam) -> None:
    x, taps, lam, grad = make_inputs(2, 4, *shape, 2, torch.float64)
    lam = lam if with_lam else None
    inputs = [t.requires_grad_() for t in (x, taps, lam) if t is not None]
    h = reference.line_scan(x, taps, lam, direction, segment)
    expected = torch.autograd.grad(h, inputs, grad, allow_unused=True)
    expected = [torch.zeros_like(t) if e is None else e for t, e in zip(inputs, expected, strict=True)]
    actual = reference.line_scan_backward(grad, h.detach(), x, taps, lam, direction, segment, True, with_lam)
    for name, a, e in zip(("dx", "dtaps", "dlam"), actual, expected, strict=False):
        torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}")


def test_constant_input_counts_lines() -> None:
    # With lam = x = 1 and taps that sum to one, h_i = i + 1 exactly: each path is an average, the state their sum.
    x = torch.ones(1, 2, 6, 5, dtype=torch.float64)
    for direction in gspn.DIRECTIONS:
        taps = gspn.stochastic_taps(torch.randn(1, 2, 3, 6, 5, dtype=torch.float64), direction=direction)
        h = gspn.line_scan(x, taps, direction=direction, impl="reference")
        lines = 6 if direction in ("down", "up") else 5
        step = torch.arange(1, lines + 1, dtype=torch.float64)
        step = step.flip(0) if direction in ("up", "left") else step
        expected = step.view(-1, 1).expand(6, 5) if lines == 6 else step.view(1, -1).expand(6, 5)
        torch.testing.assert_close(h, expected.expand_as(h))
