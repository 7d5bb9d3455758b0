"""``line_scan`` through the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..directions import scan_axes
from ..valid_size import in_scan_order
from .c_structs import DTYPE_CODES, LineScanCall, as_image, as_taps
from .library import load, run


def _run(
    function: Callable[..., int], direction: str, segment: int | None, valid_size: Tensor | None, taps: Tensor,
    h: Tensor, dtaps: Tensor | None = None, **images: Tensor | None,
) -> None:  # fmt: skip
    axes = scan_axes(direction)
    columns = axes.line == -1
    batch, channels, *frame = h.shape
    lines, cross = frame[axes.line], frame[axes.cross]
    sizes = in_scan_order(valid_size, axes.line)
    call = LineScanCall(
        dtype=DTYPE_CODES[h.dtype], reverse=axes.reverse, batch=batch, channels=channels, groups=taps.shape[1],
        lines=lines, cross=cross, segment=lines if segment is None else min(segment, lines), h=as_image(h, columns),
        sizes=None if sizes is None else sizes.data_ptr(), taps=as_taps(taps, columns), dtaps=as_taps(dtaps, columns),
        **{name: as_image(image, columns) for name, image in images.items() if image is not None},
    )  # fmt: skip
    run(function, call, f"line_scan over {lines} lines of {cross} positions")


def line_scan(
    x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None, valid_size: Tensor | None = None
) -> Tensor:
    """The forward scan; see :func:`gspn.line_scan`."""
    h = torch.empty_like(x)
    if h.numel():
        _run(load().gspn_line_scan, direction, segment, valid_size, x=x, taps=taps, lam=lam, h=h)
    return h


def line_scan_backward(
    grad: Tensor, h: Tensor, x: Tensor | None, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None,
    need_taps: bool, need_lam: bool, valid_size: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """All gradients in one sweep; see :func:`gspn.ops.reference.line_scan_backward`."""
    dx = torch.empty_like(h if x is None else x)
    dtaps = torch.empty_like(taps) if need_taps else None
    dlam = torch.empty_like(lam) if need_lam and lam is not None else None
    if dx.numel():
        _run(
            load().gspn_line_scan_backward, direction, segment, valid_size, x=None if dlam is None else x, taps=taps,
            lam=lam, h=h, grad=grad, dx=dx, dtaps=dtaps, dlam=dlam,
        )  # fmt: skip
    elif dtaps is not None:
        dtaps.zero_()
    return dx, dtaps, dlam
