"""``propagate`` through the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..directions import DIRECTIONS
from .c_structs import DTYPE_CODES, PropagateCall, as_image
from .library import load

# A vector may be read beyond the proxy's last state.
_VECTOR = 64


def _run(function: Callable[..., int], call: PropagateCall) -> None:
    if function(ctypes.byref(call), torch.get_num_threads()):
        raise MemoryError(
            f"propagate over {call.batch} x {call.channels} maps of {call.height} x {call.width} ran out of memory."
        )


def _states_last(batch: int, states: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """A fresh ``[B, H, W, S]``: all states of a pixel side by side.

    Rows begin an odd number of cache lines apart. Were it a power of two, the pixels of a column would meet in one set
    of the cache.
    """
    line = 64 // dtype.itemsize
    lines = -(-width * states // line)
    row = (lines + 1 - lines % 2) * line
    size = batch * height * row + _VECTOR
    memory = torch.empty(size, dtype=dtype)
    load().gspn_expect_first_touch(memory.data_ptr(), size * dtype.itemsize)
    memory[size - _VECTOR :].zero_()
    return memory.as_strided((batch, height, width, states), (height * row, row, states, 1))


def _call(
    x: Tensor, proxy: Tensor, projections: tuple[Tensor, ...], directions: tuple[str, ...], segment: int | None
) -> PropagateCall:
    """All that forward and backward share; ``projections`` are dense, with the skip if there is one."""
    batch, channels, height, width = x.shape
    tap_proj, lam_proj, u_proj, *skip_proj = projections
    longest = max(height, width)
    towards = (ctypes.c_int32 * 4)(*(DIRECTIONS.index(d) for d in directions))  # type: ignore[arg-type]
    return PropagateCall(
        dtype=DTYPE_CODES[x.dtype], directions=len(directions), towards=towards, batch=batch, channels=channels,
        groups=tap_proj.shape[1], states=proxy.shape[-1], height=height, width=width, proxy_row=proxy.stride(1),
        segment=longest if segment is None else min(segment, longest), x=as_image(x), proxy=proxy.data_ptr(),
        tap_proj=tap_proj.data_ptr(), lam_proj=lam_proj.data_ptr(), u_proj=u_proj.data_ptr(),
        skip_proj=skip_proj[0].data_ptr() if skip_proj else None,
    )  # fmt: skip


def propagate(
    x: Tensor,
    proxy: Tensor,
    tap_proj: Tensor,
    lam_proj: Tensor,
    u_proj: Tensor,
    skip_proj: Tensor | None,
    directions: tuple[str, ...],
    segment: int | None,
) -> Tensor:
    """The forward; see :func:`gspn.propagate`."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    batch, count, height, width = proxy.shape
    states = _states_last(batch, count, height, width, tap_proj.dtype).copy_(proxy.permute(0, 2, 3, 1))
    projections = tuple(p.contiguous() for p in (tap_proj, lam_proj, u_proj, skip_proj) if p is not None)
    call = _call(x, states, projections, directions, segment)
    call.y = as_image(y)
    _run(load().gspn_propagate, call)
    return y


def propagate_backward(
    grad: Tensor,
    x: Tensor,
    proxy: Tensor,
    tap_proj: Tensor,
    lam_proj: Tensor,
    u_proj: Tensor,
    skip_proj: Tensor | None,
    directions: tuple[str, ...],
    segment: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """All gradients; see :func:`gspn.ops.reference.propagate_backward`."""
    dx, dproxy = torch.empty_like(x), torch.empty_like(proxy)
    given = [p for p in (tap_proj, lam_proj, u_proj, skip_proj) if p is not None]
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in given]
    if x.numel() == 0:
        dproxy.zero_()
        for g in grads:
            g.zero_()
    else:
        batch, count, height, width = proxy.shape
        states = _states_last(batch, count, height, width, tap_proj.dtype).copy_(proxy.permute(0, 2, 3, 1))
        dstates = _states_last(batch, count, height, width, tap_proj.dtype)
        projections = tuple(p.contiguous() for p in given)
        call = _call(x, states, projections, directions, segment)
        call.grad, call.dx, call.dproxy = as_image(grad), as_image(dx), dstates.data_ptr()
        call.dtap_proj, call.dlam_proj, call.du_proj = (g.data_ptr() for g in grads[:3])
        if skip_proj is not None:
            call.dskip_proj = grads[3].data_ptr()
        _run(load().gspn_propagate_backward, call)
        dproxy.copy_(dstates.permute(0, 3, 1, 2))
    return dx, dproxy, grads[0], grads[1], grads[2], None if skip_proj is None else grads[3]
