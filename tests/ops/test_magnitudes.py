"""Taps and states of any size that the dtype holds: every element as exact as its terms are large."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gspn
from gspn.ops.cpu import instruction_set, instruction_sets
from propagate_cases import in_doubles, magnitudes, run, state_dtype
from support import DTYPES, every_pair, laid_out, scan_and_gradients

ALL = ",".join(gspn.DIRECTIONS)
SHAPE = (6, 5)


def logits(dtype: torch.dtype) -> Tensor:
    """Three taps each: moderate, underflowing alone and together, hundreds apart, and the largest of the dtype."""
    most = torch.finfo(dtype).max
    rows = [
        (0.5, -1.0, 2.0), (-43, 0, -43), (-60, 60, 0), (-88, -90, -87), (88, 87.5, 100), (-200, 0, 100),
        (300, -300, 0), (-1e4, -1e4, -2e4), (1e4, 2e4, 1e4), (most, -most, 0), (-most, -most, -most),
        (-most, -most / 2, -most), (most, most, most / 2),
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64).to(dtype).to(state_dtype(dtype))


def states(dtype: torch.dtype, size: str, channels: int) -> tuple[Tensor, Tensor]:
    """``x`` and a gradient that keeps the sums of the backward in range."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(2, 1, channels, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    large, small = torch.finfo(dtype).max / 128, torch.finfo(dtype).tiny * 4
    x, grad = {
        "one": (unit[0], unit[1]),
        "large": (unit[0] * large, unit[1] / 2048),
        "small": (unit[0] * small, unit[1]),
        "large gradient": (unit[0] * 4 / 2048, unit[1] * large),
        # Of every size beside each other: a tap of 1e-30 on a state of 1e38 is more than one of 1 on a state of 1.
        "mixed": (unit[0].sign() * small ** (1 - unit[0].abs()) * large ** unit[0].abs(), unit[1] / 2048),
    }[size]
    return x.to(dtype), grad.to(dtype)


def compare(
    actual: dict[str, Tensor], exact: dict[str, Tensor], scale: dict[str, Tensor], what: str, x: Tensor
) -> None:  # fmt: skip
    dtype, wide = x.dtype, torch.finfo(state_dtype(x.dtype))
    for name, result in actual.items():
        limits = torch.finfo(result.dtype)
        # The power of a logit of a hundred is as exact as the logit, and below the normal numbers nothing is.
        allowed = (16 * limits.eps + 400 * wide.eps) * scale[name]
        allowed += 1000 * (limits.tiny * limits.eps + wide.tiny * wide.eps * max(1.0, x.abs().max().item()))
        # A sum of terms beyond the largest number may be anything.
        error = torch.where(scale[name] < min(limits.max, torch.finfo(dtype).max) / 4, result.double() - exact[name], 0)
        worst = (error.abs() / allowed).nan_to_num(nan=torch.inf).argmax()
        assert (error.abs() <= allowed).all(), (
            f"{what} {name}: {result.flatten()[worst]} for {exact[name].flatten()[worst]} at {worst}"
        )


def check(x: Tensor, grad: Tensor, tap_proj: Tensor, proxy_channels: int, impls: list[str]) -> None:
    dtype, wide = x.dtype, state_dtype(x.dtype)
    proxy = torch.rand(1, proxy_channels, *SHAPE).to(dtype)
    proxy[:, 0] = 1
    gates = torch.rand(9, x.shape[1], proxy_channels).to(dtype).to(wide) / proxy_channels / 2
    tap_proj = torch.nn.functional.pad(tap_proj.unsqueeze(-1), (0, proxy_channels - 1))
    arguments = (x, proxy, tap_proj, gates[:4], gates[4:8], gates[8])
    # Everything but dx is linear in x, and in smaller numbers float64 leaves room for all sums.
    less = 2.0**-200 if x.abs().max() > 1e200 else 1.0
    doubles = in_doubles((x * less, *arguments[1:]))
    exact, scale = (
        {name: t if name == "dx" else t / less for name, t in results.items()}
        for results in (
            run(doubles, grad.double(), ALL, None, "reference"), magnitudes(doubles, grad, ALL, None)
        )
    )  # fmt: skip
    for impl in impls:
        if impl == "reference":
            compare(run(arguments, grad, ALL, None, impl), exact, scale, impl, x)
        else:
            with instruction_set(impl):
                compare(run(arguments, grad, ALL, None, "cpu"), exact, scale, impl, x)


@every_pair(
    dtype=DTYPES, size=["one", "large", "small", "large gradient", "mixed"], proxy_channels=[2, 3], shared=[False, True]
)
def test_propagate_is_exact_for_every_logit_and_state(dtype, size, proxy_channels, shared) -> None:
    triples = logits(dtype)
    impls = [*instruction_sets(), *(["reference"] if dtype in (torch.float32, torch.float64) else [])]
    if not shared:
        # Every channel has its own taps, in every direction another order of them.
        tap_proj = torch.stack([triples.roll(d, 1) for d in range(4)])
        check(*states(dtype, size, len(triples)), tap_proj, proxy_channels, impls)
        return
    for some in triples.split(4):
        tap_proj = some[torch.arange(4) % len(some), None]
        check(*states(dtype, size, 3), tap_proj, proxy_channels, impls)


@every_pair(
    dtype=DTYPES,
    size=["one", "large", "small", "large gradient", "mixed"],
    direction=gspn.DIRECTIONS,
    layout=["contiguous", "channels_last", "transposed"],
    groups=[13, 1],
)
def test_line_scan_is_exact_for_every_state(dtype, size, direction, layout, groups) -> None:
    triples = logits(dtype)[:groups, :, None, None].expand(-1, -1, *SHAPE)
    taps = gspn.stochastic_taps(triples[None].to(dtype), direction=direction)
    x, grad = states(dtype, size, 13)
    lam = torch.rand(x.shape).to(dtype)
    x, taps, lam, grad = (laid_out(t, layout) for t in (x, taps, lam, grad))
    less = 2.0**-200 if x.abs().max() > 1e200 else 1.0

    def exactly(change: Callable[[Tensor], Tensor], h: Tensor) -> dict[str, Tensor]:
        w, gate, g, a, state = (change(t.double()) for t in (taps, lam, grad, x, h))
        how = {"h": state * less, "direction": direction, "segment": None, "impl": "reference"}
        results = scan_and_gradients(a * less, w, gate, g, **how)
        return {name: t if name == "dx" else t / less for name, t in results.items()}

    for isa in instruction_sets():
        with instruction_set(isa):
            actual = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=None, impl="cpu")
        exact, scale = exactly(lambda t: t, actual["h"]), exactly(torch.abs, actual["h"])
        compare(actual, exact, scale, isa, x)
