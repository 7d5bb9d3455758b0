"""First, second and third derivatives by finite differences, and what a backward pass may leave out."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gspn
from support import CPU_IMPLS, every_pair, make_inputs


@every_pair(
    impl=CPU_IMPLS,
    direction=gspn.DIRECTIONS,
    segment=[None, 2],
    shape_groups=[((3, 4), 2), ((1, 3), 4), ((5, 1), 1)],
    with_lam=[True, False],
)
def test_gradcheck_and_gradgradcheck(impl, direction, segment, shape_groups, with_lam) -> None:
    shape, groups = shape_groups
    x, taps, lam, _ = (t.requires_grad_() for t in make_inputs(1, 4, *shape, groups, torch.float64))
    inputs = (x, taps, lam) if with_lam else (x, taps)

    def scan(*tensors):
        return gspn.line_scan(*tensors, direction=direction, segment=segment, impl=impl)

    assert gradcheck(scan, inputs)
    assert gradgradcheck(scan, inputs, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_third_derivative(impl) -> None:
    x, taps, lam, _ = (t.requires_grad_() for t in make_inputs(1, 2, 3, 3, 1, torch.float64))

    def second(x, taps, lam):
        h = gspn.line_scan(x, taps, lam, direction="right", impl=impl)
        first = torch.autograd.grad(h.pow(3).sum(), (x, taps, lam), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, taps, lam), create_graph=True)

    assert gradcheck(second, (x, taps, lam))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs(impl, wanted) -> None:
    tensors = make_inputs(2, 4, 5, 6, 2, torch.float64)[:3]
    for t in tensors:
        t.requires_grad_()
    full = torch.autograd.grad(gspn.line_scan(*tensors, direction="up", impl=impl).pow(2).sum(), tensors)
    some = [t if i in wanted else t.detach() for i, t in enumerate(tensors)]
    h = gspn.line_scan(*some, direction="up", impl=impl)
    grads = torch.autograd.grad(h.pow(2).sum(), [some[i] for i in wanted])
    for i, g in zip(wanted, grads, strict=True):
        torch.testing.assert_close(g, full[i])


def test_only_what_the_backward_reads_is_kept() -> None:
    x, taps, lam, _ = make_inputs(1, 4, 8, 8, 4, torch.float32)
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gspn.line_scan(x, taps.requires_grad_(), lam, direction="down")
    assert x.data_ptr() not in kept  # x enters the gradient of lam alone


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_checkpointing_gives_the_same_gradients(impl) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = [t.requires_grad_() for t in make_inputs(2, 4, 5, 6, 2, torch.float32)[:3]]

    def scan(x, taps, lam):
        return gspn.line_scan(x, taps, lam, direction="left", impl=impl).pow(2).sum()

    plain = torch.autograd.grad(scan(*tensors), tensors)
    saved = torch.autograd.grad(checkpoint(scan, *tensors, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
