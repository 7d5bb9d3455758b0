"""A launch: a kernel with all its arguments, on the device of its tensors.

Nothing here waits for the device or reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..directions import ScanAxes
from .planner import Limits, Plan, Sizes, Strides

TENSOR_CORES = ((8, 0), (9, 0), (10, 0), (10, 3))
"""The compute capabilities whose tensor cores are at least four times as fast at TF32 as the units for float32."""


class _Compiled(NamedTuple):
    """A kernel compiled for a plan and for tensors of some dtypes and alignments: Triton looks at nothing again."""

    run: Callable[..., None]
    arguments: list[Any]
    """All but the tensors, in the kernel's order."""
    places: list[int]
    """Those of the tensors."""


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments."""

    kernel: Any
    plan: Plan
    tensors: Mapping[str, Tensor | None]
    """By the name of the argument; None for those that the kernel does without."""

    def run(self) -> None:
        """Launch it on the device of its tensors, whichever is current."""
        if _recorded is not None:
            _recorded.append(self)
            return
        device = next(t.device for t in self.tensors.values() if t is not None)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run_on(device.index)
        else:
            self._run_on(device.index)

    def _run_on(self, device: int | None) -> None:
        tensors = self.tensors.values()
        # All that a kernel is compiled for and that a plan does not fix.
        key = (device, *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
        compiled: _Compiled | None = self.plan.compiled.get(key)
        if compiled is not None:
            arguments = compiled.arguments.copy()
            for place, tensor in zip(compiled.places, tensors, strict=True):
                arguments[place] = tensor
            compiled.run(*arguments)
            return
        named = self.arguments()
        kernel = self.kernel[self.plan.grid](**named)
        # The interpreter compiles nothing, and for AMD the sizes of tensors matter too.
        if kernel is not None and torch.version.hip is None:
            names = self.kernel.arg_names
            grid = (*self.plan.grid, 1, 1)[:3]
            constants = [None if name in self.tensors else named[name] for name in names]
            self.plan.compiled[key] = _Compiled(kernel[grid], constants, [names.index(name) for name in self.tensors])

    def arguments(self) -> dict[str, Any]:
        """The arguments that the kernel is called with, and the compiler's options."""
        # Fusion is explicit because Triton is about to change its default.
        options = {"num_warps": self.plan.num_warps, "enable_fp_fusion": True}
        return {**self.tensors, **self.plan.integers, **self.plan.constants, **options}


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it nothing is launched: launches are put into a list instead, which is what tensors on meta are for."""
    global _recorded
    _recorded = launches = []
    try:
        yield launches
    finally:
        _recorded = None


@functools.cache
def _shared_memory(device: int) -> int:
    if torch.version.hip is not None:
        return 64 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)


@functools.cache
def _tensor_cores(device: int) -> bool:
    """Whether a card's tensor cores can make maps, and Triton is one with Gluon."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) not in TENSOR_CORES:
        return False
    try:
        import triton.experimental.gluon  # noqa: F401
    except ImportError:
        return False
    return True


_imposed = Limits()


@contextlib.contextmanager
def planned(like: tuple[int, int] | None = None, **choice: int) -> Iterator[None]:
    """Within it launches are planned otherwise than by the rules alone: for checks and measurements.

    Args:
        like: batch and channels of a larger call, whose kernels a smaller one is to run.
        **choice: values in place of what the rules choose; see :class:`~.planner.Limits`.
    """
    global _imposed
    before, _imposed = _imposed, Limits(like=like, choice=tuple(choice.items()))
    try:
        yield
    finally:
        _imposed = before


def limits_of(device: torch.device) -> Limits:
    """The limits of a call on this device, with those that :func:`planned` imposes."""
    if device.type != "cuda":
        return _imposed._replace(ptx=False)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _imposed._replace(
        shared_memory=_shared_memory(index), ptx=torch.version.hip is None, tensor_cores=_tensor_cores(index)
    )


def strides_of(tensor: Tensor, axes: ScanAxes) -> Strides:
    """The strides of ``[B, C, H, W]`` or ``[B, G, 3, H, W]``."""
    tap = tensor.stride(2) if tensor.dim() == 5 else 0
    return Strides(tensor.stride(0), tensor.stride(1), tensor.stride(axes.cross), tensor.stride(axes.line), tap)


def sizes_of(x: Tensor, groups: int, axes: ScanAxes) -> Sizes:
    """The sizes of a scan of ``x [B, C, H, W]``."""
    return Sizes(x.shape[0], x.shape[1], groups, x.shape[axes.cross], x.shape[axes.line])


def scratch(plan: Plan, like: Tensor) -> Tensor | None:
    """The memory in which the states of long rows wait, on ``like``'s device; None where a row is one block."""
    return None if plan.states is None else like.new_empty(plan.states, dtype=torch.float32)
