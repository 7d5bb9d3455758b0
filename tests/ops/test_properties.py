"""Properties over shapes that nobody thought of."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gspn
from support import DTYPES, LAYOUTS, check_line_scan, make_inputs, scan_and_gradients

sizes = st.integers(1, 40)
directions = st.sampled_from(gspn.DIRECTIONS)
segments = st.one_of(st.none(), st.integers(1, 45))


@st.composite
def problems(draw):
    groups, per_group = draw(st.sampled_from([1, 2, 3, 5, 16])), draw(st.sampled_from([1, 2, 3, 8, 33]))
    return make_inputs(
        draw(st.integers(1, 3)), groups * per_group, draw(sizes), draw(sizes), groups, draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)), seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), directions, segments)
def test_the_kernels_are_the_specification(tensors, direction, segment) -> None:
    check_line_scan(tensors, direction, segment)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), directions, segments, st.floats(-3, 3))
def test_linear_in_x_and_in_lam(tensors, direction, segment, factor) -> None:
    x, taps, lam, other = (t.double() for t in tensors)

    def scan(x, lam):
        return gspn.line_scan(x, taps, lam, direction=direction, segment=segment)

    torch.testing.assert_close(scan(x + factor * other, lam), scan(x, lam) + factor * scan(other, lam))
    torch.testing.assert_close(scan(x, lam + factor * other), scan(x, lam) + factor * scan(x, other))
    torch.testing.assert_close(scan(x, lam), scan(lam, x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), directions, segments)
def test_the_backward_is_the_adjoint(tensors, direction, segment) -> None:
    # <grad, A x> = <A^T grad, x> for the linear map A of one scan.
    x, taps, lam, grad = (t.double() for t in tensors)
    results = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=segment, impl="cpu")
    torch.testing.assert_close((grad * results["h"]).sum(), (results["dx"] * x).sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), directions, segments)
def test_stochastic_taps_keep_the_state_between_the_extremes(tensors, direction, segment) -> None:
    x, logits, *_ = (t.double() for t in tensors)
    taps = gspn.stochastic_taps(logits, direction=direction)
    lines = x.shape[-2] if direction in ("down", "up") else x.shape[-1]
    steps = lines if segment is None else min(segment, lines)
    h = gspn.line_scan(x, taps, direction=direction, segment=segment)
    assert (h.abs() <= steps * x.abs().amax() * (1 + 1e-9)).all()
