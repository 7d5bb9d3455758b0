"""The C structs of ``kernels/line_scan.h`` and ``kernels/propagate.h``, field by field, and how tensors fill them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Map(ctypes.Structure):
    """A tensor ``[batch, channel, line, cross]``; null data: absent."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("line", ctypes.c_int64),
        ("cross", ctypes.c_int64),
    )


class TapMap(ctypes.Structure):
    """A tensor ``[batch, group, tap, line, cross]``; null data: absent."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("tap", ctypes.c_int64),
        ("line", ctypes.c_int64),
        ("cross", ctypes.c_int64),
    )


class LineScanCall(ctypes.Structure):
    """One call of ``gspn_line_scan`` or ``gspn_line_scan_backward``."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("reverse", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("lines", ctypes.c_int64),
        ("cross", ctypes.c_int64),
        ("segment", ctypes.c_int64),
        ("x", Map),
        ("lam", Map),
        ("h", Map),
        ("taps", TapMap),
        ("grad", Map),
        ("dx", Map),
        ("dlam", Map),
        ("dtaps", TapMap),
    )


class Image(ctypes.Structure):
    """A tensor ``[batch, channel, row, column]``; null data: absent."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
    )


class PropagateCall(ctypes.Structure):
    """One call of ``gspn_propagate`` or ``gspn_propagate_backward``."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("directions", ctypes.c_int32),
        ("towards", ctypes.c_int32 * 4),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("states", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("proxy_row", ctypes.c_int64),
        ("segment", ctypes.c_int64),
        ("x", Image),
        ("y", Image),
        ("proxy", ctypes.c_void_p),
        ("tap_proj", ctypes.c_void_p),
        ("lam_proj", ctypes.c_void_p),
        ("u_proj", ctypes.c_void_p),
        ("skip_proj", ctypes.c_void_p),
        ("grad", Image),
        ("dx", Image),
        ("dproxy", ctypes.c_void_p),
        ("dtap_proj", ctypes.c_void_p),
        ("dlam_proj", ctypes.c_void_p),
        ("du_proj", ctypes.c_void_p),
        ("dskip_proj", ctypes.c_void_p),
    )


def as_image(tensor: Tensor) -> Image:
    """``tensor`` as ``propagate``'s kernels see it."""
    return Image(tensor.data_ptr(), *tensor.stride())


def as_map(tensor: Tensor | None, columns: bool) -> Map:
    """``tensor`` as the kernels see it; with ``columns``, columns are the lines."""
    if tensor is None:
        return Map()
    batch, channel, height, width = tensor.stride()
    line, cross = (width, height) if columns else (height, width)
    return Map(tensor.data_ptr(), batch, channel, line, cross)


def as_tap_map(tensor: Tensor | None, columns: bool) -> TapMap:
    """``tensor`` as the kernels see it; with ``columns``, columns are the lines."""
    if tensor is None:
        return TapMap()
    batch, group, tap, height, width = tensor.stride()
    line, cross = (width, height) if columns else (height, width)
    return TapMap(tensor.data_ptr(), batch, group, tap, line, cross)
