"""``line_scan`` and its adjoint by the Triton kernels: allocates the results, fills in a plan's arguments and launches.

Nothing here waits for the device or reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..directions import ScanAxes, scan_axes
from .line_scan_config import SHARED_MEMORY, LaunchPlan, Limits, Sizes, Strides, plan
from .line_scan_kernels import backward_kernel, forward_kernel


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments."""

    kernel: Any
    plan: LaunchPlan
    tensors: Mapping[str, Tensor]
    integers: Mapping[str, int]

    def run(self) -> None:
        """Launch it on the device of its tensors, whichever is current."""
        some = self.tensors["states_ptr"]
        with torch.cuda.device(some.device) if some.is_cuda else contextlib.nullcontext():
            self.kernel[(self.plan.programs,)](
                **self.tensors,
                **self.integers,
                **self.plan.constants,
                num_warps=self.plan.num_warps,
                # Said aloud because Triton is about to change what it does by default.
                enable_fp_fusion=True,
            )


@functools.cache
def _shared_memory(device: int) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)


def limits_of(device: torch.device) -> Limits:
    """What a program may use on this device."""
    if device.type != "cuda":
        return Limits(SHARED_MEMORY)
    return Limits(_shared_memory(torch.cuda.current_device() if device.index is None else device.index))


def _strides(tensor: Tensor, axes: ScanAxes) -> Strides:
    tap = tensor.stride(2) if tensor.dim() == 5 else 0
    return Strides(tensor.stride(0), tensor.stride(1), tensor.stride(axes.cross), tensor.stride(axes.line), tap)


def _prepare(
    kernel: Any,
    tensors: dict[str, Tensor | None],
    like: Tensor,
    groups: int,
    direction: str,
    segment: int | None,
    limits: Limits,
    **what: bool,
) -> Launch:
    """Plan the launch of a kernel for its tensors by name, None for those it does without."""
    axes = scan_axes(direction)
    sizes = Sizes(like.shape[0], like.shape[1], groups, like.shape[axes.cross], like.shape[axes.line])
    chosen = plan(
        sizes,
        tuple((name, None if tensor is None else _strides(tensor, axes)) for name, tensor in tensors.items()),
        like.element_size(),
        reverse=axes.reverse,
        segment=segment,
        limits=limits,
        **what,
    )
    states = like if chosen.states is None else like.new_empty(chosen.states, dtype=torch.float32)
    pointers = {f"{name}_ptr": like if tensor is None else tensor for name, tensor in tensors.items()}
    return Launch(kernel, chosen, {**pointers, "states_ptr": states}, chosen.integers)


def prepare_forward(
    x: Tensor, taps: Tensor, lam: Tensor | None, h: Tensor, direction: str, segment: int | None, limits: Limits
) -> Launch:
    """The launch that writes ``h``. The tensors may be on the meta device."""
    tensors = {"x": x, "taps": taps, "lam": lam, "h": h}
    return _prepare(
        forward_kernel, tensors, x, taps.shape[1], direction, segment, limits, backward=False, has_lam=lam is not None
    )


def prepare_backward(
    grad: Tensor,
    h: Tensor,
    x: Tensor | None,
    taps: Tensor,
    lam: Tensor | None,
    dx: Tensor,
    dtaps: Tensor | None,
    dlam: Tensor | None,
    direction: str,
    segment: int | None,
    limits: Limits,
) -> tuple[Launch, Tensor | None]:
    """The launch that writes ``dx``, ``dtaps`` and ``dlam``, and the tensor whose sum over its first axis is ``dtaps``.

    That tensor is None where the kernel writes ``dtaps`` itself: only where several programs share the channels of a
    group does each leave a sum of its own, in float32, for the order of the additions to be always the same.
    """
    tensors = {
        "grad": grad,
        "h": h if dtaps is not None else None,
        "x": x if dlam is not None else None,
        "taps": taps,
        "lam": lam,
        "dx": dx,
        "dtaps": dtaps,
        "dlam": dlam,
    }
    launch = _prepare(
        backward_kernel,
        tensors,
        grad,
        taps.shape[1],
        direction,
        segment,
        limits,
        backward=True,
        has_lam=lam is not None,
        need_taps=dtaps is not None,
        need_lam=dlam is not None,
    )
    if dtaps is None or launch.plan.blocks == 1 or not launch.plan.constants["SHARED"]:
        return replace(launch, integers={**launch.integers, "dtaps_block": 0}), None
    apart = dtaps.numel()
    sums = torch.empty_strided(
        (launch.plan.blocks, *dtaps.shape), (apart, *dtaps.stride()), dtype=torch.float32, device=dtaps.device
    )
    return replace(
        launch,
        tensors={**launch.tensors, "dtaps_ptr": sums},
        integers={**launch.integers, "dtaps_block": apart // launch.plan.constants["TAPS_ALIGN"]},
    ), sums


def line_scan(
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    direction: str,
    segment: int | None,
    limits: Limits | None = None,
) -> Tensor:
    """``h``; see :func:`gspn.line_scan`. ``limits`` is for tests."""
    h = torch.empty_like(x)
    if x.numel() > 0:
        prepare_forward(x, taps, lam, h, direction, segment, limits or limits_of(x.device)).run()
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
    limits: Limits | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dx`` and, where needed, ``dtaps`` and ``dlam``, in one sweep. ``limits`` is for tests."""
    dx = torch.empty_like(h if x is None else x)
    dlam = torch.empty_like(lam) if need_lam and lam is not None else None
    if grad.numel() == 0:
        return dx, torch.zeros_like(taps) if need_taps else None, dlam
    dtaps = torch.empty_like(taps) if need_taps else None
    launch, sums = prepare_backward(
        grad, h, x, taps, lam, dx, dtaps, dlam, direction, segment, limits or limits_of(grad.device)
    )
    launch.run()
    if dtaps is not None and sums is not None:
        dtaps.copy_(sums.sum(0))
    return dx, dtaps, dlam
