"""Floating-point operations of the scans for ``torch.utils.flop_counter``, which counts two for a multiply-add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.gspn.line_scan)
def _line_scan_flops(
    x_shape: Sequence[int], taps_shape: Sequence[int], lam_shape: Sequence[int] | None, *args: Any, **kwargs: Any
) -> int:
    """A multiply-add for each of the three taps, and one for the gate if there is one."""
    del taps_shape, args, kwargs
    return 2 * math.prod(x_shape) * (3 if lam_shape is None else 4)


@register_flop_formula(torch.ops.gspn.line_scan_backward)
def _line_scan_backward_flops(
    grad_shape: Sequence[int],
    h_shape: Sequence[int],
    x_shape: Sequence[int] | None,
    taps_shape: Sequence[int],
    lam_shape: Sequence[int] | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Three taps for the state's gradient, three products for the taps', and one for each of x and lam."""
    del h_shape, x_shape, taps_shape, args, kwargs
    return 2 * math.prod(grad_shape) * (6 if lam_shape is None else 8)


def _propagate_macs(
    x_shape: Sequence[int],
    proxy_shape: Sequence[int],
    tap_shape: Sequence[int],
    skip_shape: Sequence[int] | None,
) -> tuple[int, int]:
    """Multiply-adds of the projections and of the scans. The skips of all directions are one projection."""
    batch, channels, height, width = x_shape
    proxy_channels, (directions, groups) = proxy_shape[1], tap_shape[:2]
    outputs = directions * (3 * groups + 2 * channels) + (0 if skip_shape is None else channels)
    pixels = batch * height * width
    return pixels * outputs * proxy_channels, pixels * directions * channels * 4


@register_flop_formula(torch.ops.gspn.propagate)
def _propagate_flops(
    x_shape: Sequence[int],
    proxy_shape: Sequence[int],
    tap_shape: Sequence[int],
    lam_shape: Sequence[int],
    u_shape: Sequence[int],
    skip_shape: Sequence[int] | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The operations of the composition: projections to the maps, three taps and the gate."""
    del lam_shape, u_shape, args, kwargs
    return 2 * sum(_propagate_macs(x_shape, proxy_shape, tap_shape, skip_shape))


@register_flop_formula(torch.ops.gspn.propagate_backward)
def _propagate_backward_flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    proxy_shape: Sequence[int],
    tap_shape: Sequence[int],
    lam_shape: Sequence[int],
    u_shape: Sequence[int],
    skip_shape: Sequence[int] | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Recomputed maps and states, each map's gradient to the proxy and to its projection, and the scans' backward."""
    del grad_shape, lam_shape, u_shape, args, kwargs
    projections, scans = _propagate_macs(x_shape, proxy_shape, tap_shape, skip_shape)
    return 2 * (3 * projections + 3 * scans)
