"""``line_scan`` and its adjoint by the Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..directions import scan_axes
from ..valid_size import empty_or_zeros, in_scan_order
from .launch import Launch, limits_of, scratch, sizes_of, strides_of
from .line_scan_kernels import backward_kernel, forward_kernel
from .planner import Limits, plan_line_scan


def _prepare(
    kernel: Any, tensors: dict[str, Tensor | None], like: Tensor, groups: int, direction: str, segment: int | None,
    limits: Limits, valid_size: Tensor | None,
) -> Launch:  # fmt: skip
    """Plan the launch of a kernel for its tensors by name, None for those it does without."""
    axes = scan_axes(direction)
    strides = tuple((name, None if tensor is None else strides_of(tensor, axes)) for name, tensor in tensors.items())
    plan = plan_line_scan(
        sizes_of(like, groups, axes), strides, like.element_size(),
        reverse=axes.reverse, segment=segment, limits=limits,
    )  # fmt: skip
    pointers = {f"p_{name}": tensor for name, tensor in tensors.items()}
    sizes = in_scan_order(valid_size, axes.line)
    return Launch(kernel, plan, {**pointers, "p_states": scratch(plan, like), "p_sizes": sizes})


def prepare_forward(
    x: Tensor, taps: Tensor, lam: Tensor | None, h: Tensor, direction: str, segment: int | None, limits: Limits,
    valid_size: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes ``h``. The tensors may be on the meta device."""
    tensors = {"x": x, "taps": taps, "lam": lam, "h": h}
    return _prepare(forward_kernel, tensors, x, taps.shape[1], direction, segment, limits, valid_size)


def prepare_backward(
    grad: Tensor, h: Tensor, x: Tensor | None, taps: Tensor, lam: Tensor | None,
    dx: Tensor, dtaps: Tensor | None, dlam: Tensor | None, direction: str, segment: int | None, limits: Limits,
    valid_size: Tensor | None = None,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """The launch that writes ``dx``, ``dtaps`` and ``dlam``, and the tensor whose sum over its first axis is ``dtaps``.

    That tensor is None where the kernel writes ``dtaps`` itself: only where several programs share the channels of a
    group does each leave a sum of its own, in float32, for the order of the additions to be always the same.
    """
    tensors = {
        "grad": grad, "h": None if dtaps is None else h, "x": None if dlam is None else x, "taps": taps, "lam": lam,
        "dx": dx, "dtaps": dtaps, "dlam": dlam,
    }  # fmt: skip
    launch = _prepare(backward_kernel, tensors, grad, taps.shape[1], direction, segment, limits, valid_size)
    plan, sums, between = launch.plan, None, 0
    if dtaps is not None and plan.channel_blocks > 1 and plan.constants["SHARED"]:
        strides = (dtaps.numel(), *dtaps.stride())
        sums = torch.empty_strided(
            (plan.channel_blocks, *dtaps.shape), strides, dtype=torch.float32, device=dtaps.device
        )
        sums = sums if valid_size is None else sums.zero_()
        between = dtaps.numel() // plan.constants["TAPS_ALIGN"]
    plan = replace(plan, integers={**plan.integers, "s_dtaps_block": between})
    return replace(launch, plan=plan, tensors={**launch.tensors, "p_dtaps": dtaps if sums is None else sums}), sums


def line_scan(
    x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None, valid_size: Tensor | None = None,
    limits: Limits | None = None,
) -> Tensor:  # fmt: skip
    """``h``; see :func:`gspn.line_scan`. ``limits`` is for tests."""
    h = empty_or_zeros(x, valid_size)
    if x.numel() > 0:
        prepare_forward(x, taps, lam, h, direction, segment, limits or limits_of(x.device), valid_size).run()
    return h


def line_scan_backward(
    grad: Tensor, h: Tensor, x: Tensor | None, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None,
    need_taps: bool, need_lam: bool, valid_size: Tensor | None = None, limits: Limits | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``dx`` and, where needed, ``dtaps`` and ``dlam``, in one sweep. ``limits`` is for tests."""
    dx = empty_or_zeros(h if x is None else x, valid_size)
    dlam = empty_or_zeros(lam, valid_size) if need_lam and lam is not None else None
    if grad.numel() == 0:
        return dx, torch.zeros_like(taps) if need_taps else None, dlam
    dtaps = empty_or_zeros(taps, valid_size) if need_taps else None
    launch, sums = prepare_backward(
        grad, h, x, taps, lam, dx, dtaps, dlam, direction, segment, limits or limits_of(grad.device), valid_size
    )
    launch.run()
    if dtaps is not None and sums is not None:
        dtaps.copy_(sums.sum(0))
    return dx, dtaps, dlam
