"""Floating-point operations of the scans for ``torch.utils.flop_counter``, which counts two for a multiply-add."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.gspn.line_scan)
def _line_scan_flops(x: Shape, _taps: Shape, lam: Shape | None, *_: Any, **__: Any) -> int:
    """A multiply-add for each of the three taps, and one for the gate if there is one."""
    return 2 * math.prod(x) * (3 if lam is None else 4)


@register_flop_formula(torch.ops.gspn.line_scan_backward)
def _line_scan_backward_flops(
    grad: Shape, _h: Shape, _x: Shape | None, _taps: Shape, lam: Shape | None, *_: Any, **__: Any
) -> int:
    """Three taps for the state's gradient, three products for the taps', and one for each of x and lam."""
    return 2 * math.prod(grad) * (6 if lam is None else 8)


def _composition_flops(x: Shape, proxy: Shape, taps: Shape, skip: Shape | None) -> int:
    """Those of the projections, where the skips of all directions are one, and of the scans with their gates."""
    batch, channels, height, width = x
    proxy_channels, (directions, groups) = proxy[1], taps[:2]
    outputs = directions * (3 * groups + 2 * channels) + (0 if skip is None else channels)
    return 2 * batch * height * width * (outputs * proxy_channels + directions * channels * 4)


@register_flop_formula(torch.ops.gspn.propagate)
def _propagate_flops(
    x: Shape, proxy: Shape, taps: Shape, _lam: Shape, _u: Shape, skip: Shape | None, *_: Any, **__: Any
) -> int:
    return _composition_flops(x, proxy, taps, skip)


@register_flop_formula(torch.ops.gspn.propagate_backward)
def _propagate_backward_flops(
    _grad: Shape, x: Shape, proxy: Shape, taps: Shape, _lam: Shape, _u: Shape, skip: Shape | None, *_: Any, **__: Any
) -> int:
    """Recomputed maps and states, each map's gradient to the proxy and to its projection, and the scans' backward."""
    return 3 * _composition_flops(x, proxy, taps, skip)
