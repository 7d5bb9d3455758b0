"""A baseline: ``line_scan`` forward with one kernel launch a line, the structure of GSPN-1's first CUDA kernels.

Every line is read back from memory by the next launch, and the state has the tensors' dtype. The baseline is as fast as
this structure allows: consecutive threads take consecutive pixels of a line, and the launches are replayed from a CUDA
graph, so that Python's launch overhead does not count. This module imports triton: import it only where it is used.
"""

# ruff: noqa: ANN001, ANN202  (a Triton kernel's arguments have no types to state)

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn.ops.directions import scan_axes

_BLOCK = 256


@triton.jit(do_not_specialize=["line", "previous"])
def _one_line(
    x_ptr, taps_ptr, lam_ptr, h_ptr, line, previous, channels, per_group, cross,
    x_batch, x_channel, x_line, x_cross, lam_batch, lam_channel, lam_line, lam_cross,
    h_batch, h_channel, h_line, h_cross, taps_batch, taps_group, taps_tap, taps_line, taps_cross,
    HAS_PREVIOUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)  # the axis of a grid without a limit that matters
    b = plane // channels
    c = plane % channels
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < cross
    line = line.to(tl.int64)
    previous = previous.to(tl.int64)

    x = tl.load(x_ptr + b * x_batch + c * x_channel + line * x_line + j * x_cross, inside, 0.0)
    lam = tl.load(lam_ptr + b * lam_batch + c * lam_channel + line * lam_line + j * lam_cross, inside, 0.0)
    state = x.to(tl.float32) * lam.to(tl.float32)
    if HAS_PREVIOUS:
        taps = taps_ptr + b * taps_batch + (c // per_group) * taps_group + line * taps_line + j * taps_cross
        before = h_ptr + b * h_batch + c * h_channel + previous * h_line + j * h_cross
        for k in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues]
            exists = inside & (j + k - 1 >= 0) & (j + k - 1 < cross)
            tap = tl.load(taps + k * taps_tap, exists, 0.0)
            state += tap.to(tl.float32) * tl.load(before + (k - 1) * h_cross, exists, 0.0).to(tl.float32)
    h = h_ptr + b * h_batch + c * h_channel + line * h_line + j * h_cross
    tl.store(h, state.to(h_ptr.dtype.element_ty), inside)


class LinePerLaunch:
    """The baseline on fixed tensors: a call computes and returns ``h``, always the same tensor."""

    def __init__(self, x: Tensor, taps: Tensor, lam: Tensor, direction: str, segment: int | None) -> None:
        self._inputs = (x, taps, lam)
        self._axes = scan_axes(direction)
        self._segment = segment
        self.h = torch.empty_like(x)
        self._run: Callable[[], object] = self._launch_all
        with self._device():
            self._launch_all()  # compiles
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
            graph = torch.cuda.CUDAGraph()
            with self._device(), torch.cuda.graph(graph):
                self._launch_all()
            self._run = graph.replay

    def __call__(self) -> Tensor:
        """Compute ``h`` again."""
        with self._device():
            self._run()
        return self.h

    def _device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.h.device) if self.h.is_cuda else nullcontext()

    def _launch_all(self) -> None:
        x, taps, lam = self._inputs
        line, cross = self._axes.line, self._axes.cross
        batch, channels = x.shape[:2]
        groups, count, size = taps.shape[1], x.shape[line], x.shape[cross]
        strides = []
        for map_ in (x, lam, self.h):
            strides += [map_.stride(0), map_.stride(1), map_.stride(line), map_.stride(cross)]
        strides += [*taps.stride()[:3], taps.stride(line), taps.stride(cross)]
        grid = (batch * channels, triton.cdiv(size, _BLOCK))
        order = range(count - 1, -1, -1) if self._axes.reverse else range(count)
        for step, i in enumerate(order):
            restart = step == 0 if self._segment is None else step % self._segment == 0
            _one_line[grid](  # pyright: ignore[reportIndexIssue]
                x, taps, lam, self.h, i, i + 1 if self._axes.reverse else i - 1, channels, channels // groups, size,
                *strides, HAS_PREVIOUS=not restart, BLOCK=_BLOCK,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
