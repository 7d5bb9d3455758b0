"""The C structs of ``kernels/*/call.h``, field by field, and how tensors fill them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _integers(*names: str) -> tuple[tuple[str, type[ctypes.c_int64]], ...]:
    return tuple((name, ctypes.c_int64) for name in names)


def _pointers(*names: str) -> tuple[tuple[str, type[ctypes.c_void_p]], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


class Image(ctypes.Structure):
    """A tensor ``[batch, channel, row, column]`` and its strides; null data: absent."""

    _fields_ = (*_pointers("data"), *_integers("batch", "channel", "row", "column"))


class Taps(ctypes.Structure):
    """A tensor ``[batch, group, tap, row, column]``: an image of groups for each of the three taps."""

    _fields_ = (("image", Image), *_integers("tap"))


class LineScanCall(ctypes.Structure):
    """One call of ``gspn_line_scan`` or ``gspn_line_scan_backward``."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("reverse", ctypes.c_int32),
        *_integers("batch", "channels", "groups", "lines", "cross", "segment"),
        *_pointers("sizes"),
        ("x", Image),
        ("lam", Image),
        ("h", Image),
        ("taps", Taps),
        ("grad", Image),
        ("dx", Image),
        ("dlam", Image),
        ("dtaps", Taps),
    )


class PropagateCall(ctypes.Structure):
    """One call of ``gspn_propagate`` or ``gspn_propagate_backward``."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("direction_count", ctypes.c_int32),
        ("directions", ctypes.c_int32 * 4),
        *_integers("batch", "channels", "groups", "proxy_channels", "height", "width", "proxy_row", "proxy_image"),
        *_integers("segment"),
        *_pointers("sizes"),
        ("x", Image),
        ("y", Image),
        *_pointers("proxy", "tap_proj", "lam_proj", "u_proj", "skip_proj"),
        ("grad", Image),
        ("dx", Image),
        *_pointers("dproxy", "dtap_proj", "dlam_proj", "du_proj", "dskip_proj"),
    )


def as_image(tensor: Tensor, columns_as_rows: bool = False) -> Image:
    """``tensor`` as the kernels see it; the three taps of one, which have a stride of their own, are left out."""
    batch, channel, *_, row, column = tensor.stride()
    if columns_as_rows:
        row, column = column, row
    return Image(tensor.data_ptr(), batch, channel, row, column)


def as_taps(tensor: Tensor | None, columns_as_rows: bool = False) -> Taps:
    """``tensor`` as the kernels see it; None as absent."""
    return Taps() if tensor is None else Taps(as_image(tensor, columns_as_rows), tensor.stride(2))
