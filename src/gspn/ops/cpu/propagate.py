"""``propagate`` through the compiled kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..directions import DIRECTIONS
from ..valid_size import in_scan_order
from .c_structs import DTYPE_CODES, Image, PropagateCall, as_image
from .library import load, run

# A vector may be read beyond the proxy's last channel. What it finds there is not used.
_VECTOR = 64


def _channels_last(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """A fresh ``[B, S, H, W]`` for a proxy, with all channels of a pixel side by side.

    Rows begin an odd number of cache lines apart. Were it a power of two, the pixels of a column would meet in one set
    of the cache.
    """
    line = 64 // dtype.itemsize
    lines = -(-width * channels // line)
    row = (lines + 1 - lines % 2) * line
    size = batch * height * row + _VECTOR
    memory = torch.empty(size, dtype=dtype)
    if size > 1 << 20:  # below, there is nothing to gain
        load().gspn_expect_first_touch(memory.data_ptr(), size * dtype.itemsize)
    return memory.as_strided((batch, channels, height, width), (height * row, 1, row, channels))


@functools.cache
def _codes(directions: tuple[str, ...]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * 4)(*map(DIRECTIONS.index, directions))  # pyright: ignore[reportArgumentType]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(
    function: Callable[..., int], x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
    skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None,
    **outputs: Image | int | None,
) -> None:  # fmt: skip
    batch, channels, height, width = x.shape
    tap_proj, lam_proj, u_proj = tap_proj.contiguous(), lam_proj.contiguous(), u_proj.contiguous()
    skip_proj = None if skip_proj is None else skip_proj.contiguous()
    channels_last = _channels_last(*proxy.shape, dtype=tap_proj.dtype).copy_(proxy)
    longest = max(height, width)
    sizes = in_scan_order(valid_size, -2)
    call = PropagateCall(
        dtype=DTYPE_CODES[x.dtype], direction_count=len(directions), directions=_codes(directions),
        batch=batch, channels=channels, groups=tap_proj.shape[1], proxy_channels=proxy.shape[1], height=height,
        width=width, proxy_row=channels_last.stride(2), proxy_image=channels_last.stride(0),
        segment=longest if segment is None else min(segment, longest), sizes=_address(sizes), x=as_image(x),
        proxy=channels_last.data_ptr(), tap_proj=tap_proj.data_ptr(), lam_proj=lam_proj.data_ptr(),
        u_proj=u_proj.data_ptr(), skip_proj=_address(skip_proj), **outputs,
    )  # fmt: skip
    run(function, call, f"propagate over {batch} x {channels} maps of {height} x {width}")


def propagate(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The forward; see :func:`gspn.propagate`."""
    y = torch.empty_like(x)
    if y.numel():
        projections = (tap_proj, lam_proj, u_proj, skip_proj)
        _run(load().gspn_propagate, x, proxy, *projections, directions, segment, valid_size, y=as_image(y))
    return y


def propagate_backward(
    grad: Tensor, x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
    skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """All gradients; see :func:`gspn.ops.reference.propagate_backward`."""
    dx, dproxy = torch.empty_like(x), torch.empty_like(proxy)
    projections = (tap_proj, lam_proj, u_proj, skip_proj)
    dtap, dlam, du = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in (tap_proj, lam_proj, u_proj))
    dskip = None if skip_proj is None else torch.empty_like(skip_proj, memory_format=torch.contiguous_format)
    if x.numel():
        channels_last = _channels_last(*proxy.shape, dtype=tap_proj.dtype)
        _run(
            load().gspn_propagate_backward, x, proxy, *projections, directions, segment, valid_size,
            grad=as_image(grad), dx=as_image(dx), dproxy=channels_last.data_ptr(), dtap_proj=dtap.data_ptr(),
            dlam_proj=dlam.data_ptr(), du_proj=du.data_ptr(), dskip_proj=_address(dskip),
        )  # fmt: skip
        dproxy.copy_(channels_last)
    else:
        for gradient in (dproxy, dtap, dlam, du, dskip):
            if gradient is not None:
                gradient.zero_()
    return dx, dproxy, dtap, dlam, du, dskip
