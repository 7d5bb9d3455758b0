"""Arguments for the Triton kernels of propagate, and the check of all their results against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gspn
from gspn.ops.unfused import project_taps
from support import assert_as_exact_as_pytorch, laid_out

NAMES = ("y", "dx", "dproxy", "dtap_proj", "dlam_proj", "du_proj", "dskip_proj")


def make_arguments(
    batch: int, channels: int, height: int, width: int, states: int, groups: int, dtype: torch.dtype = torch.float32, *,
    directions: tuple[str, ...] = gspn.DIRECTIONS, segment: int | None = None, skip: bool = True,
    layout: str = "contiguous", logits: float = 1.0, sign: int = 0, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """``grad`` and all arguments of the operator; logits of one ``sign`` (0: both), some ``logits`` large."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    count = len(directions)
    x, grad = (laid_out(random(batch, channels, height, width).to(dtype), layout) for _ in range(2))
    proxy = random(batch, states, height, width)
    taps = random(count, groups, 3, states) * logits
    if sign:
        proxy, taps = proxy.abs(), taps.abs() * sign
    lam, u, of_skip = random(count, channels, states), random(count, channels, states), random(channels, states)
    projections = (t.float() / states**0.5 for t in (lam, u, of_skip))
    lam, u, of_skip = projections
    proxy = laid_out(proxy.to(dtype), layout)
    return grad, x, proxy, taps.float(), lam, u, of_skip if skip else None, directions, segment


def _results(grad: Tensor, arguments: tuple[Any, ...], module: Any, **how: Any) -> list[Tensor | None]:
    return [module.propagate(*arguments, **how), *module.propagate_backward(grad, *arguments, **how)]


def _magnitudes(grad: Tensor, arguments: tuple[Any, ...]) -> list[Tensor | None]:
    """Sums of the absolute terms of each result, in float64: its formulas with the taps as they are."""
    from gspn.ops import reference

    x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment = arguments
    x, p, grad = x.abs(), proxy.abs(), grad.abs()

    def project(weight: Tensor) -> Tensor:
        return torch.einsum("bshw,cs->bchw", p, weight.abs())

    def of_map(d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("bchw,cs->bshw", d, weight.abs()), torch.einsum("bchw,bshw->cs", d, p)

    y, dx, dproxy = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(p)
    dtap, dlam, du = (torch.zeros_like(t) for t in (tap_proj, lam_proj, u_proj))
    dskip = None
    if skip_proj is not None:
        y += project(skip_proj) * x
        dx += project(skip_proj) * grad
        add, dskip = of_map(x * grad, skip_proj)
        dproxy += add
    for d, direction in enumerate(directions):
        taps = gspn.stochastic_taps(project_taps(proxy, tap_proj[d]), direction=direction)
        lam, u = project(lam_proj[d]), project(u_proj[d])
        h = reference.line_scan(x, taps, lam, direction, segment)
        y += u * h
        dx_d, dtaps, dlam_map = reference.line_scan_backward(grad * u, h, x, taps, lam, direction, segment, True, True)
        dx += dx_d
        dlogits = taps * (dtaps + (taps * dtaps).sum(2, keepdim=True))
        for gradient, weight, out in (
            (grad * h, u_proj[d], du[d]),
            (dlam_map, lam_proj[d], dlam[d]),
            (dlogits.flatten(1, 2), tap_proj[d].flatten(0, 1), dtap[d].flatten(0, 1)),
        ):
            add, own = of_map(gradient, weight)
            dproxy += add
            out += own
    return [y, dx, dproxy, dtap, dlam, du, dskip]


def check(grad: Tensor, *arguments: Any, **limits_of_plans: Any) -> None:
    """Forward and every gradient against float64, by the rule that all implementations follow.

    ``limits_of_plans`` are some of :class:`~gspn.ops.triton.planner.Limits`: with ``row``, longer rows take more than
    one block.
    """
    from gspn.ops import reference
    from gspn.ops.triton import propagate
    from gspn.ops.triton.launch import limits_of

    limits = limits_of(grad.device)._replace(**limits_of_plans)
    actual = _results(grad, arguments, propagate, limits=limits)
    plain = _results(grad, arguments, reference)
    doubles = tuple(t.double() if isinstance(t, Tensor) else t for t in arguments)
    exact = _results(grad.double(), doubles, reference)
    magnitude = _magnitudes(grad.double(), doubles)
    what = f"{arguments[6:]} {arguments[0].shape=} {arguments[2].shape=} {grad.dtype=} {arguments[0].stride()=}"
    # One direction after the other, in case they were computed side by side.
    in_turn = propagate.propagate(*arguments, limits=limits._replace(together=False))
    assert actual[0] is not None
    if grad.device.type == "cpu":
        assert torch.equal(actual[0], in_turn), what
    assert_as_exact_as_pytorch(in_turn, plain[0], exact[0], magnitude[0], f"y, one direction after the other, {what}")
    for name, *results in zip(NAMES, actual, plain, exact, magnitude, strict=True):
        assert (results[0] is None) == (results[1] is None)
        if results[0] is not None:
            # In a half dtype plain PyTorch rounds a projection, and its gradient through it, to that dtype.
            if grad.dtype != torch.float32 and "proj" in name:
                assert results[0].dtype == torch.float32
            assert_as_exact_as_pytorch(*results, f"{name} {what}")


def check_forward(y: Tensor, *arguments: Any) -> None:
    """The result of a forward alone against float64, by the same rule."""
    from gspn.ops import reference

    doubles = tuple(t.double() if isinstance(t, Tensor) else t for t in arguments)
    plain, exact = reference.propagate(*arguments), reference.propagate(*doubles)
    what = f"{arguments[6:]} {arguments[0].shape=} {arguments[2].shape=} {y.dtype=} {arguments[0].stride()=}"
    assert_as_exact_as_pytorch(y, plain, exact, _magnitudes(doubles[0], doubles)[0], what)  # type: ignore[arg-type]
