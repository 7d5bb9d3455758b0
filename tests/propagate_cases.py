"""Shared by the tests of ``propagate``: inputs, results with every gradient, and the size of what they are sums of."""

from __future__ import annotations

import torch
from torch import Tensor

import gspn
from gspn.ops.cpu import instruction_set, instruction_sets
from gspn.ops.unfused import project, project_taps
from support import assert_as_exact_as_pytorch, laid_out

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
ALL = ",".join(gspn.DIRECTIONS)
NAMES = ("dx", "dproxy", "dtap_proj", "dlam_proj", "du_proj", "dskip_proj")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the projections inside the operator."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_arguments(
    batch: int, channels: int, height: int, width: int, states: int, groups: int, dtype: torch.dtype, *,
    directions: int = 4, skip: bool = True, layout: str = "contiguous", proxy_layout: str | None = None, seed: int = 0,
    logits: float = 2.0,
) -> tuple[Arguments, Tensor]:  # fmt: skip
    """The operator's tensors, and a gradient of its result. Gates are small, so that float16 suffices."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    x, grad = (laid_out(random(batch, channels, height, width).to(dtype), layout) for _ in range(2))
    proxy = laid_out(random(batch, states, height, width).to(dtype), proxy_layout or layout)
    wide = state_dtype(dtype)
    tap_proj = random(directions, groups, 3, states) * logits
    lam_proj, u_proj = (random(directions, channels, states) / states**0.5 for _ in range(2))
    skip_proj = random(channels, states) / states**0.5 if skip else None
    # Values that half precision holds: what is compared is the arithmetic, not the rounding of the arguments.
    projections = [None if p is None else p.to(dtype).to(wide) for p in (tap_proj, lam_proj, u_proj, skip_proj)]
    return (x, proxy, *projections), grad  # type: ignore[return-value]


def run(arguments: Arguments, grad: Tensor, directions: str, segment: int | None, impl: str) -> dict[str, Tensor]:
    """The result and every gradient."""
    y = torch.ops.gspn.propagate(*arguments, directions, segment, impl)
    grads = torch.ops.gspn.propagate_backward(grad, *arguments, directions, segment, impl)
    results = {"y": y} | dict(zip(NAMES, grads, strict=True))
    if arguments[-1] is None:
        assert results.pop("dskip_proj").numel() == 0
    return results


def in_doubles(arguments: Arguments) -> Arguments:
    """The same values in float64."""
    return tuple(None if t is None else t.double() for t in arguments)  # type: ignore[return-value]


def magnitudes(arguments: Arguments, grad: Tensor, directions: str, segment: int | None) -> dict[str, Tensor]:
    """Each result with every term replaced by its absolute value: the scale of unavoidable roundings. In float64."""
    x, proxy, tap_proj, lam_proj, u_proj, skip_proj = in_doubles(arguments)
    ax, ap, ag = x.abs(), proxy.abs(), grad.double().abs()
    results = {"y": torch.zeros_like(ax), "dx": torch.zeros_like(ax), "dproxy": torch.zeros_like(ap)}
    parts: dict[str, list[Tensor]] = {"dtap_proj": [], "dlam_proj": [], "du_proj": []}

    def to_proxy(map_grad: Tensor, weight: Tensor) -> Tensor:
        results["dproxy"] += torch.einsum("bchw,cs->bshw", map_grad, weight.abs())
        return torch.einsum("bchw,bshw->cs", map_grad, ap)

    if skip_proj is not None:
        weight = project(ap, skip_proj.abs())
        results["y"] += weight * ax
        results["dx"] += weight * ag
        results["dskip_proj"] = to_proxy(ax * ag, skip_proj)
    for d, direction in enumerate(directions.split(",")):
        taps = gspn.stochastic_taps(project_taps(proxy, tap_proj[d]), direction=direction)  # type: ignore[arg-type]
        lam, u = project(ap, lam_proj[d].abs()), project(ap, u_proj[d].abs())
        h = torch.ops.gspn.line_scan(ax, taps, lam, direction, segment, "reference")
        dx, dtaps, dlam = torch.ops.gspn.line_scan_backward(
            ag * u, h, ax, taps, lam, direction, segment, "reference", True, True
        )
        results["y"] += u * h
        results["dx"] += dx
        parts["du_proj"].append(to_proxy(ag * h, u_proj[d]))
        parts["dlam_proj"].append(to_proxy(dlam, lam_proj[d]))
        dlogits = taps * (dtaps + (taps * dtaps).sum(2, keepdim=True))
        weight = tap_proj[d].flatten(0, 1)
        parts["dtap_proj"].append(to_proxy(dlogits.flatten(1, 2), weight).view_as(tap_proj[d]))
    return results | {name: torch.stack(each) for name, each in parts.items()}


def check_propagate(arguments: Arguments, grad: Tensor, segment: int | None, directions: str = ALL) -> None:
    """The CPU kernels, with each instruction set, against the specification: the result and every gradient."""
    plain = run(arguments, grad, directions, segment, "reference")
    exact = run(in_doubles(arguments), grad.double(), directions, segment, "reference")
    magnitude = magnitudes(arguments, grad, directions, segment)
    for isa in instruction_sets():
        with instruction_set(isa):
            actual = run(arguments, grad, directions, segment, "cpu")
        for name in plain:
            # In float64 plain PyTorch is what the result is compared with, and its own roundings are not seen.
            scale = magnitude[name] * (8 if grad.dtype == torch.float64 else 1)
            assert_as_exact_as_pytorch(actual[name], plain[name], exact[name], scale, f"{isa} {name}")
