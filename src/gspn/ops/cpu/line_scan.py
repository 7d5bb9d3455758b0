"""``line_scan`` through the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..directions import scan_axes
from .c_structs import DTYPE_CODES, LineScanCall, Map, TapMap, as_map, as_tap_map
from .library import load


def _run(function: Callable[..., int], call: LineScanCall) -> None:
    if function(ctypes.byref(call), torch.get_num_threads()):
        raise MemoryError(f"line_scan over {call.lines} lines of {call.cross} positions ran out of scratch memory.")


def line_scan(x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None) -> Tensor:
    """The forward scan; see :func:`gspn.line_scan`."""
    h = torch.empty_like(x)
    if h.numel() == 0:
        return h
    axes = scan_axes(direction)
    columns = axes.line == -1
    batch, channels, *_ = x.shape
    lines, cross = x.shape[axes.line], x.shape[axes.cross]
    call = LineScanCall(
        DTYPE_CODES[x.dtype], axes.reverse, batch, channels, taps.shape[1], lines, cross,
        lines if segment is None else min(segment, lines),
        as_map(x, columns), as_map(lam, columns), as_map(h, columns), as_tap_map(taps, columns),
    )  # fmt: skip
    _run(load().gspn_line_scan, call)
    return h


def line_scan_backward(
    grad: Tensor,
    h: Tensor,
    x: Tensor | None,
    taps: Tensor,
    lam: Tensor | None,
    direction: str,
    segment: int | None,
    need_taps: bool,
    need_lam: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All gradients in one sweep; see :func:`gspn.ops.reference.line_scan_backward`."""
    dx = torch.empty_like(h if x is None else x)
    dtaps = torch.empty_like(taps) if need_taps else None
    dlam = torch.empty_like(lam) if need_lam and lam is not None else None
    if dx.numel() == 0:
        return dx, None if dtaps is None else dtaps.zero_(), dlam
    axes = scan_axes(direction)
    columns = axes.line == -1
    batch, channels, *_ = h.shape
    lines, cross = h.shape[axes.line], h.shape[axes.cross]
    call = LineScanCall(
        DTYPE_CODES[h.dtype], axes.reverse, batch, channels, taps.shape[1], lines, cross,
        lines if segment is None else min(segment, lines),
        as_map(x, columns) if dlam is not None else Map(), as_map(lam, columns), as_map(h, columns),
        as_tap_map(taps, columns),
        as_map(grad, columns), as_map(dx, columns), as_map(dlam, columns),
        TapMap() if dtaps is None else as_tap_map(dtaps, columns),
    )  # fmt: skip
    _run(load().gspn_line_scan_backward, call)
    return dx, dtaps, dlam
