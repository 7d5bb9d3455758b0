"""Operations of the scans, as ``torch.utils.flop_counter`` counts those of matrix products: two for a multiply-add."""

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
    """Three taps and, where there is one, the gate: a multiply-add each."""
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
