r"""``propagate`` and its gradients by the Triton kernels: plans and launches one direction after the other.

What a call must do, with N the pixels of ``x``, S the channels of the proxy and D directions: it reads ``x`` and the
proxy and writes ``y``, 2 N and N S / C numbers; it takes (5 S + 4) D N multiply-adds, those of three logits and two
gates and of the scan (plus S + 1 with a skip), and 6 D N exponentials and D N divisions. Logits and exponentials count
once for each group, not channel. At 16 special functions a cycle and multiprocessor, taps for each channel take some
three times as long as the memory does; with shared taps the multiply-adds are the floor from S = 8 on.

**Forward**, D launches. The directions follow each other and add to ``y`` in place, so that the order of the sum is
fixed: D reads of ``x``, 2 D - 1 of and to ``y``. For bfloat16 and float16 what is added to is a float32 tensor of the
size of ``x``, and the last direction writes ``y``. Nothing else is kept but copies of the proxy: one with lines across
for ``"right"`` and ``"left"``, and one in rows if it is not contiguous.

**Backward**, three launches a direction: the states again, the adjoint states, and then the gradients of all pixels
side by side. Memory beside the results, in numbers of 4 bytes: the states and the adjoint states, 2 N; for half types
the sum of ``dx`` over the directions, N; for the proxy's gradient a sum per span of channel blocks, at most
max(N / 2, that of one proxy); for the projections' a sum per program, ``[programs, 6, C, S]`` at most, with up to 512
programs. These are added up in a fixed order, so that results are the same bits on every run.

Nothing here waits for the device or reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..directions import scan_axes
from .line_scan import limits_of
from .line_scan_config import (
    CHANNEL,
    CROSS,
    LINE,
    NONE,
    Limits,
    Sizes,
    Strides,
    alignment,
    fast_axis,
    power_of_two,
    run_length,
    unit_axes,
    without_ones,
)
from .propagate_gradient_kernels import gradients_kernel
from .propagate_kernels import scan_kernel

_PROGRAMS = 512
"""Programs of the gradients' kernel, four for each of 130 multiprocessors; constant, for the order of the sums."""


_ENOUGH_WARPS = 2048
"""Sixteen for each multiprocessor."""


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    tensors: Mapping[str, Tensor]
    integers: Mapping[str, int]
    constants: Mapping[str, Any]

    def run(self) -> None:
        """Launch it on the device of its tensors, whichever is current."""
        some = self.tensors["proxy_ptr"]
        with torch.cuda.device(some.device) if some.is_cuda else contextlib.nullcontext():
            self.kernel[self.grid](
                **self.tensors, **self.integers, **self.constants, num_warps=self.num_warps, enable_fp_fusion=True
            )


@dataclass(frozen=True)
class Projections:
    """Those of one direction, contiguous."""

    taps: Tensor
    """``[G, 3, S]``"""
    lam: Tensor
    """``[C, S]``"""
    u: Tensor
    """``[C, S]``"""
    skip: Tensor | None
    """``[C, S]``, for the one direction that takes care of it."""


@dataclass(frozen=True)
class ScanPlan:
    """How the scans of a direction are launched, forward and adjoint."""

    programs: int
    num_warps: int
    constants: Mapping[str, Any]
    integers: Mapping[str, int]
    states: tuple[int, ...] | None
    """Shape of the float32 scratch that rows longer than a block need."""


def _smaller(block: int, programs_of_one: int, channels: int) -> int:
    """Halve a block of channels while there are fewer than two programs for each multiprocessor."""
    while block > 1 and programs_of_one * math.ceil(channels / block) < 256:
        block //= 2
    return block


@functools.lru_cache(maxsize=4096)
def plan_scan(
    sizes: Sizes,
    source: Strides,
    out: Strides,
    itemsize: int,
    states: int,
    *,
    reverse: bool,
    segment: int | None,
    limits: Limits,
) -> ScanPlan:
    """The launch of ``scan_kernel`` for images of these sizes and strides and a proxy of ``states`` channels."""
    strides = {"in": without_ones(source, sizes, False), "out": without_ones(out, sizes, False)}
    units = {name: unit_axes(s, False) for name, s in strides.items()}
    fast = fast_axis(units, False)
    own = {name: fast if fast in axes else axes[0] if axes else NONE for name, axes in units.items()}
    along = {CHANNEL: sizes.channels, CROSS: sizes.cross, LINE: sizes.lines}[fast]
    align = alignment(strides, own, (along,), min(4, 16 // itemsize))

    # A block of channels reads the rows of the proxy once. Rows are padded to a warp's breadth at most.
    rows, most_channels = power_of_two(sizes.cross), power_of_two(sizes.channels)
    few = min(8, power_of_two(sizes.lines)) if fast == LINE else 1
    longest = limits.row or {LINE: 512, CROSS: 1024, CHANNEL: 128}[fast]
    row = min(rows, longest)
    if fast == CHANNEL:
        block, least = max(min(64 // itemsize, 1024 // row), 16 // itemsize), 16 // itemsize
    else:
        block, least = max(256 // row, 1), max(64 // row, 1)
    block = min(max(_smaller(block, sizes.batch, sizes.channels), least), most_channels)
    halo = 0
    if sizes.cross > row:
        few = min(few, row // 4)
        halo = (2 * few if row > 4 * few else few) if few > 1 else 8
    pixels = block * row
    restart = sizes.lines if segment is None else min(segment, sizes.lines)
    run = run_length(sizes.lines, restart, few)
    if fast == LINE and run % align:
        run = sizes.lines
    chunks = math.ceil(sizes.lines / run)
    programs = sizes.batch * chunks * math.ceil(sizes.channels / block)
    per_group = sizes.channels // sizes.groups

    # Four pixels a thread where that leaves every multiprocessor warps enough to hide latencies with; else as few as
    # make the 4 bytes that can be read ahead.
    vector = align if fast == CROSS else 1
    while vector * itemsize > 4 and programs * pixels < _ENOUGH_WARPS * 32 * vector:
        vector //= 2
    num_warps = min(max(pixels // (32 * vector), 1), 16)

    unroll = states * few <= 64 and states <= 16
    constants = dict(
        IN_FAST=own["in"],
        OUT_FAST=own["out"],
        FAST=fast,
        ALIGN=align,
        BLOCK_C=block,
        BLOCK_N=row,
        HALO=halo,
        LINES=few,
        VECTOR=min(vector, max(pixels // (32 * num_warps), 1)),
        REVERSE=reverse,
        SEGMENTED=restart < run,
        SHARED=sizes.groups == 1 or per_group % block == 0,
        S=states,
        UNROLL=unroll,
        STAGES=2 if unroll else 1,
    )
    integers = {
        "channels": sizes.channels // align if fast == CHANNEL else sizes.channels,
        "tap_channels": per_group,
        "width": sizes.cross // align if fast == CROSS else sizes.cross,
        "lines": sizes.lines // align if fast == LINE else sizes.lines,
        "chunk": run // align if fast == LINE else run,
        "chunks": chunks,
        "segment": restart,
    }
    for name, s in strides.items():
        for axis, step in zip(("batch", "channel", "cross", "line"), s[:4], strict=True):
            integers[f"{name}_{axis}"] = step // align
    shape = (programs, 2, block, sizes.cross) if halo else None
    return ScanPlan(programs, num_warps, constants, integers, shape)


def prepare_scan(
    source: Tensor,
    before: Tensor | None,
    out: Tensor,
    rows: Tensor,
    weights: Projections,
    direction: str,
    segment: int | None,
    limits: Limits,
    *,
    adjoint: bool = False,
    gated: bool = False,
) -> Launch:
    """The launch that writes the scan of ``source [B, C, H, W]`` to ``out``, added to ``before``.

    ``rows [B, S, lines, cross]`` is the proxy. The gate of what goes in is lam, for an adjoint scan u; what comes out
    is multiplied by u if ``gated``, and the skip added if there is one. The tensors may be on the meta device.
    """
    axes = scan_axes(direction)
    strides = [
        Strides(t.stride(0), t.stride(1), t.stride(axes.cross), t.stride(axes.line)) for t in (source, out)
    ]  # in, out
    batch, channels = source.shape[:2]
    sizes = Sizes(batch, channels, weights.taps.shape[0], source.shape[axes.cross], source.shape[axes.line])
    chosen = plan_scan(
        sizes, *strides, source.element_size(), rows.shape[1], reverse=axes.reverse, segment=segment, limits=limits
    )
    tensors = {
        "in_ptr": source,
        "before_ptr": out if before is None else before,
        "out_ptr": out,
        "proxy_ptr": rows,
        "tap_ptr": weights.taps,
        "gate_ptr": weights.u if adjoint else weights.lam,
        "out_gate_ptr": weights.u,
        "skip_ptr": weights.lam if weights.skip is None or not gated else weights.skip,
        "states_ptr": rows if chosen.states is None else rows.new_empty(chosen.states, dtype=torch.float32),
    }
    constants = {
        **chosen.constants,
        "ADJOINT": adjoint,
        "GATED": gated,
        "HAS_SKIP": gated and weights.skip is not None,
        "ADD": before is not None,
    }
    return Launch(scan_kernel, (chosen.programs,), chosen.num_warps, tensors, chosen.integers, constants)


def _fast(image: Tensor) -> int:
    """How ``gradients_kernel`` walks an image: along the channels, along all pixels, or as strides say."""
    if image.stride(1) == 1 and image.shape[1] > 1:
        return 0
    _, _, height, width = image.shape
    columns = width == 1 or image.stride(3) == 1
    return 1 if columns and (height == 1 or image.stride(2) == width) else 3


def _of_channels(taps: Tensor, channels: int) -> Tensor:
    """``[G, 3, S]`` to ``[3, C, S]``."""
    return taps.repeat_interleave(channels // taps.shape[0], dim=0, output_size=channels).transpose(0, 1)


def prepare_gradients(
    x: Tensor,
    grad: Tensor,
    h: Tensor,
    g: Tensor,
    before: Tensor | None,
    dx: Tensor,
    rows: Tensor,
    weights: Projections,
    dproxy: Tensor | None,
    direction: str,
    segment: int | None,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that adds a direction's gradients to ``dx`` and ``dproxy``; and ``dproxy`` and the sums it writes.

    ``rows`` is the proxy in rows, whatever the direction. ``dproxy [spans, B, S, H, W]`` is None for the first one.
    """
    axes = scan_axes(direction)
    batch, channels, height, width = x.shape
    states = rows.shape[1]
    block_c = 16
    block_n = 32
    blocks = math.ceil(channels / block_c)
    # As many sums for the proxy as take half the memory of an image.
    spans = max(min(blocks, channels // (2 * states)), 1)
    span_blocks = math.ceil(blocks / spans)
    spans = math.ceil(blocks / span_blocks)
    image_tiles = math.ceil(height * width / block_n)
    tiles = batch * image_tiles
    programs = min(tiles, max(_PROGRAMS // spans, 1))
    added = dproxy is not None
    if dproxy is None:
        dproxy = rows.new_empty((spans, *rows.shape), dtype=torch.float32)
    packed = torch.cat([_of_channels(weights.taps, channels), weights.lam[None], weights.u[None]])
    if weights.skip is not None:
        packed = torch.cat([packed, weights.skip[None]])
    sums = packed.new_empty((programs, *packed.shape))
    integers = {
        "channels": channels,
        "tap_channels": channels // weights.taps.shape[0],
        "height": height,
        "width": width,
        "segment": x.shape[axes.line] if segment is None else min(segment, x.shape[axes.line]),
        "image_tiles": image_tiles,
        "tiles": tiles,
        "span_blocks": span_blocks,
    }
    for name, tensor in (("x", x), ("grad", grad), ("out", dx)):
        for axis, step in zip(("batch", "channel", "row", "column"), tensor.stride(), strict=True):
            integers[f"{name}_{axis}"] = step
    tensors = {
        "x_ptr": x,
        "grad_ptr": grad,
        "h_ptr": h,
        "g_ptr": g,
        "before_ptr": dx if before is None else before,
        "dx_ptr": dx,
        "proxy_ptr": rows,
        "dproxy_ptr": dproxy,
        "tap_ptr": weights.taps,
        "gate_ptr": weights.lam,
        "skip_ptr": weights.lam if weights.skip is None else weights.skip,
        "packed_ptr": packed,
        "sums_ptr": sums,
    }
    constants = dict(
        X_FAST=_fast(x),
        GRAD_FAST=_fast(grad),
        OUT_FAST=_fast(dx),
        WIDE=height * width + block_n >= 2**31,
        BLOCK_C=block_c,
        BLOCK_N=block_n,
        VERTICAL=axes.line == -2,
        REVERSE=axes.reverse,
        S=states,
        HAS_SKIP=weights.skip is not None,
        ADD_DX=before is not None,
        ADD_PROXY=added,
    )
    return (
        Launch(gradients_kernel, (programs, spans, math.ceil(states / 16)), 8, tensors, integers, constants),
        dproxy,
        sums,
    )


def _each(
    tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None, count: int
) -> list[Projections]:
    """The projections of each direction; the first has the skip."""
    taps, lam, u = (t.contiguous() for t in (tap_proj, lam_proj, u_proj))
    of_directions = [Projections(taps[d], lam[d], u[d], None) for d in range(count)]
    if skip_proj is not None:
        of_directions[0] = replace(of_directions[0], skip=skip_proj.contiguous())
    return of_directions


def _proxies(proxy: Tensor, directions: tuple[str, ...]) -> dict[int, Tensor]:
    """The proxy with its lines contiguous, ``[B, S, lines, cross]`` by the axis of the lines; always in rows."""
    across = {} if all(scan_axes(d).line == -2 for d in directions) else {-1: proxy.mT.contiguous()}
    return {-2: proxy.contiguous(), **across}


def propagate(
    x: Tensor,
    proxy: Tensor,
    tap_proj: Tensor,
    lam_proj: Tensor,
    u_proj: Tensor,
    skip_proj: Tensor | None,
    directions: tuple[str, ...],
    segment: int | None,
    limits: Limits | None = None,
) -> Tensor:
    """``y``; see :func:`gspn.propagate`. ``limits`` is for tests."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    limits = limits or limits_of(x.device)
    proxies = _proxies(proxy, directions)
    weights = _each(tap_proj, lam_proj, u_proj, skip_proj, len(directions))
    total = y if y.dtype == torch.float32 or len(directions) == 1 else torch.empty_like(y, dtype=torch.float32)
    for d, direction in enumerate(directions):
        rows = proxies[scan_axes(direction).line]
        before, out = None if d == 0 else total, y if d == len(directions) - 1 else total
        prepare_scan(x, before, out, rows, weights[d], direction, segment, limits, gated=True).run()
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
    limits: Limits | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``dx, dproxy, dtap_proj, dlam_proj, du_proj, dskip_proj``. ``limits`` is for tests."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        present = (proxy, tap_proj, lam_proj, u_proj)
        zeros = (torch.zeros_like(t) if t is proxy else t.new_zeros(t.shape) for t in present)
        return (dx, *zeros, None if skip_proj is None else skip_proj.new_zeros(skip_proj.shape))  # type: ignore[return-value]
    limits = limits or limits_of(x.device)
    proxies = _proxies(proxy, directions)
    weights = _each(tap_proj, lam_proj, u_proj, skip_proj, len(directions))
    h, g = (torch.empty_like(dx, dtype=torch.float32) for _ in range(2))
    total = dx if dx.dtype == torch.float32 or len(directions) == 1 else torch.empty_like(dx, dtype=torch.float32)
    dtap, dlam, du = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (tap_proj, lam_proj, u_proj))
    dskip = None
    dproxy = None
    for d, direction in enumerate(directions):
        rows = proxies[scan_axes(direction).line]
        prepare_scan(x, None, h, rows, weights[d], direction, segment, limits).run()
        prepare_scan(grad, None, g, rows, weights[d], direction, segment, limits, adjoint=True).run()
        before, out = None if d == 0 else total, dx if d == len(directions) - 1 else total
        launch, dproxy, sums = prepare_gradients(
            x, grad, h, g, before, out, proxies[-2], weights[d], dproxy, direction, segment
        )
        launch.run()
        groups, _, states = weights[d].taps.shape
        of_maps = sums.sum(0)  # [5 or 6, C, S]
        dtap[d] = of_maps[:3].view(3, groups, -1, states).sum(2).transpose(0, 1)
        dlam[d], du[d] = of_maps[3], of_maps[4]
        if weights[d].skip is not None:
            dskip = of_maps[5].clone()
    of_proxy = torch.empty_like(proxy)
    if dproxy is not None:
        of_proxy.copy_(dproxy.sum(0))
    return dx, of_proxy, dtap, dlam, du, dskip
