r"""``propagate`` and its gradients by the Triton kernels: plans and launches.

What a call must do, with N the pixels of ``x``, S the channels of the proxy and D directions: it reads ``x`` and the
proxy and writes ``y``, 2 N and N S / C numbers; it takes (5 S + 4) D N multiply-adds, those of three logits and two
gates and of the scan (plus S + 1 with a skip), 3 D N exponentials and 4 D N reciprocals. All instructions count, not
these alone: some 90 a pixel and direction with S = 8, more than the time in which memory moves what it has to.

**Forward**, D + 1 launches. The first packs the proxy. The directions follow each other and add to ``y`` in place, so
that the order of the sum is fixed: D reads of ``x``, 2 D - 1 of and to ``y``. For bfloat16 and float16 what is added to
is a float32 tensor of the size of ``x``, and the last direction writes ``y``. Nothing else is kept but copies of the
proxy in float32: one with rows along the width, one with rows along the height for ``"right"`` and ``"left"``. The
projections are read as they are. On the host a call looks its plans up and launches what was compiled for them.

Where there are too few rows to fill a card, three launches: all directions side by side, each to a float32 result of
its own, and their sum in the same order. The time is then that of latencies, and more bytes do not matter.

**Backward**, three launches a direction: the states again, the adjoint states, and then the gradients of all pixels
side by side. Memory beside the results, in numbers of 4 bytes: the states and the adjoint states, 2 N; for half types
the sum of ``dx`` over the directions, N; for the proxy's gradient a sum per span of channel blocks, at most
max(N / 2, that of one proxy); for the projections' a sum per program, ``[programs, 6, C, S]`` at most, with up to 512
programs. These are added up in a fixed order, so that results are the same bits on every run.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..directions import scan_axes
from .gradients_kernels import gradients_kernel
from .launch import Launch, limits_of, scratch
from .planner import Limits, Plan, Sizes, Strides, plan_propagate, plan_together
from .proxy import Proxy
from .scan_kernels import scan_kernel, sum_kernel

_PROGRAMS = 512
"""Programs of the gradients' kernel, four for each of 130 multiprocessors; constant, for the order of the sums."""


class Projections(NamedTuple):
    """Those of all directions, contiguous."""

    taps: Tensor
    """``[D, G, 3, S]``"""
    lam: Tensor
    """``[D, C, S]``"""
    u: Tensor
    """``[D, C, S]``"""
    skip: Tensor | None
    """``[C, S]``"""

    def of(self, d: int) -> Projections:
        """Those of direction ``d``, without the axis of the directions. The first one takes care of the skip."""
        return Projections(self.taps[d], self.lam[d], self.u[d], self.skip if d == 0 else None)


def projections(tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None) -> Projections:
    """The projections, as the kernels read them."""
    skip = None if skip_proj is None else skip_proj.contiguous()
    return Projections(tap_proj.contiguous(), lam_proj.contiguous(), u_proj.contiguous(), skip)


def plan_scan(
    source: Tensor, out: Tensor, weights: Projections, d: int, direction: str, segment: int | None, limits: Limits, *,
    adjoint: bool = False, gated: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a scan of ``source [B, C, H, W]`` to ``out`` by the ``d``-th projections.

    The gate of what goes in is lam, for an adjoint scan u; what comes out is multiplied by u if ``gated``, and the skip
    added by the first one. The tensors may be on the meta device.
    """
    _, groups, _, states = weights.taps.shape
    how = (source.element_size(), groups, states, d, direction, segment, limits, adjoint, gated)
    return _plan_scan(source.shape, source.stride(), out.stride(), *how)


@functools.lru_cache(maxsize=4096)
def _plan_scan(
    shape: tuple[int, ...], source: tuple[int, ...], out: tuple[int, ...], itemsize: int, groups: int, states: int,
    d: int, direction: str, segment: int | None, limits: Limits, adjoint: bool, gated: bool,
) -> Plan:  # fmt: skip
    batch, channels, *_ = shape
    axes = scan_axes(direction)
    views = (
        (name, Strides(strides[0], strides[1], strides[axes.cross], strides[axes.line]))
        for name, strides in (("in", source), ("out", out))
    )
    return plan_propagate(
        Sizes(batch, channels, groups, shape[axes.cross], shape[axes.line]), tuple(views), itemsize, states,
        reverse=axes.reverse, segment=segment, limits=limits, direction=d, adjoint=adjoint, gated=gated,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan_together(
    shape: tuple[int, ...], source: tuple[int, ...], out: tuple[int, ...], itemsize: int, groups: int, states: int,
    directions: tuple[str, ...], segment: int | None, limits: Limits,
) -> Plan | None:  # fmt: skip
    batch, channels, height, width = shape
    codes = [scan_axes(name).reverse + 2 * (scan_axes(name).line == -1) for name in directions]
    views = tuple((name, Strides(s[0], s[1], s[3], s[2])) for name, s in (("in", source), ("out", out)))
    return plan_together(
        Sizes(batch, channels, groups, width, height), views, itemsize, states, codes, segment=segment, limits=limits
    )


@functools.lru_cache(maxsize=4096)
def _plan_sum(elements: int, count: int) -> Plan:
    return Plan((math.ceil(elements / 1024),), 4, {"D": count, "BLOCK": 1024}, {"n": elements})


def prepare_scan(
    plan: Plan, source: Tensor, before: Tensor | None, out: Tensor, proxy: Proxy, weights: Projections,
    direction: str | None = None,
) -> Launch:  # fmt: skip
    """The launch of a plan, which writes to ``out`` its sum with ``before``; without a direction that of several."""
    constants = plan.constants
    line = -2 if direction is None else scan_axes(direction).line
    skips = constants["GATED"] and not plan.integers["i_direction"]
    tensors = {
        "p_in": source, "p_out": out, "p_before": before, "p_proxy": proxy.packed(line, plan),
        "p_columns": proxy.packed(-1, plan) if direction is None else None, "p_largest": proxy.largest,
        "p_taps": weights.taps, "p_lam": weights.lam, "p_u": weights.u, "p_skip": weights.skip if skips else None,
        "p_states": scratch(plan, weights.lam),
    }  # fmt: skip
    return Launch(scan_kernel, plan, tensors)


def _strides(name: str, image: Tensor) -> dict[str, int | None]:
    """How ``gradients_kernel`` walks an image: along the channels, along all pixels, or as strides say."""
    batch, channel, row, column = image.stride()
    _, channels, height, width = image.shape
    strides: dict[str, int | None] = {"batch": batch, "channel": channel, "row": row, "column": column}
    if channel == 1 and channels > 1:
        strides["channel"] = None
    elif (width == 1 or column == 1) and (height == 1 or row == width):
        strides["row"] = strides["column"] = None
    return {f"s_{name}_{axis}": stride for axis, stride in strides.items()}


def prepare_gradients(
    x: Tensor, grad: Tensor, h: Tensor, g: Tensor, before: Tensor | None, dx: Tensor, rows: Tensor,
    weights: Projections, dproxy: Tensor | None, direction: str, segment: int | None,
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """The launch that adds a direction's gradients to ``dx`` and ``dproxy``; and ``dproxy`` and the sums it writes.

    ``rows`` is the proxy in rows, whatever the direction. ``dproxy [spans, B, S, H, W]`` is None for the first one.
    """
    axes = scan_axes(direction)
    batch, channels, height, width = x.shape
    proxy_channels = rows.shape[1]
    block_c, block_n = 16, 32
    # As many sums for the proxy as take half the memory of an image.
    blocks = math.ceil(channels / block_c)
    span_blocks = math.ceil(blocks / max(min(blocks, channels // (2 * proxy_channels)), 1))
    spans = math.ceil(blocks / span_blocks)
    image_tiles = math.ceil(height * width / block_n)
    programs = min(batch * image_tiles, max(_PROGRAMS // spans, 1))
    add_proxy = dproxy is not None
    if dproxy is None:
        dproxy = rows.new_empty((spans, *rows.shape), dtype=torch.float32)
    taps = weights.taps.unsqueeze(1).expand(-1, channels // len(weights.taps), -1, -1).flatten(0, 1)  # [C, 3, S]
    maps = [taps.transpose(0, 1), weights.lam[None], weights.u[None]]
    packed = torch.cat(maps if weights.skip is None else [*maps, weights.skip[None]])
    sums = packed.new_empty((programs, *packed.shape))
    tensors = {
        "p_x": x, "p_grad": grad, "p_dx": dx, "p_h": h, "p_g": g, "p_before": before, "p_proxy": rows,
        "p_dproxy": dproxy, "p_taps": weights.taps, "p_gate": weights.lam, "p_skip": weights.skip,
        "p_packed": packed, "p_sums": sums,
    }  # fmt: skip
    integers = {
        **_strides("x", x), **_strides("grad", grad), **_strides("dx", dx),
        "n_channels": channels, "n_per_group": channels // weights.taps.shape[0], "n_rows": height, "n_columns": width,
        "n_segment": x.shape[axes.line] if segment is None else min(segment, x.shape[axes.line]),
        "n_image_tiles": image_tiles, "n_tiles": batch * image_tiles, "n_span_blocks": span_blocks,
    }  # fmt: skip
    constants = dict(
        WIDE=height * width + block_n >= 2**31, BLOCK_C=block_c, BLOCK_N=block_n, VERTICAL=axes.line == -2,
        REVERSE=axes.reverse, S=proxy_channels, ADD_PROXY=add_proxy,
    )  # fmt: skip
    plan = Plan((programs, spans, math.ceil(proxy_channels / 16)), 8, constants, integers)
    return Launch(gradients_kernel, plan, tensors), dproxy, sums


def propagate(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    directions: tuple[str, ...], segment: int | None, limits: Limits | None = None,
) -> Tensor:  # fmt: skip
    """``y``; see :func:`gspn.propagate`. ``limits`` is for tests."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    limits = limits or limits_of(x.device)
    proxies = Proxy(proxy)
    weights = projections(tap_proj, lam_proj, u_proj, skip_proj)
    plan = _plan_together(
        x.shape, x.stride(), y.stride(), x.element_size(), weights.taps.shape[1], proxy.shape[1], directions, segment,
        limits,
    )  # fmt: skip
    if plan is not None:
        proxies.pack({-2: plan, -1: plan})
        parts = y.new_empty((len(directions), y.numel()), dtype=torch.float32)
        prepare_scan(plan, x, None, parts, proxies, weights).run()
        Launch(sum_kernel, _plan_sum(y.numel(), len(directions)), {"p_parts": parts, "p_out": y}).run()
        return y
    total = y if y.dtype == torch.float32 or len(directions) == 1 else torch.empty_like(y, dtype=torch.float32)
    plans = [plan_scan(x, y, weights, d, name, segment, limits, gated=True) for d, name in enumerate(directions)]
    proxies.pack({scan_axes(name).line: plan for name, plan in zip(directions, plans, strict=True)})
    for d, (direction, plan) in enumerate(zip(directions, plans, strict=True)):
        before, out = None if d == 0 else total, y if d == len(directions) - 1 else total
        prepare_scan(plan, x, before, out, proxies, weights, direction).run()
    return y


def propagate_backward(
    grad: Tensor, x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
    skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, limits: Limits | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``dx, dproxy, dtap_proj, dlam_proj, du_proj, dskip_proj``. ``limits`` is for tests."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        present = (proxy, tap_proj, lam_proj, u_proj)
        zeros = (torch.zeros_like(t) if t is proxy else t.new_zeros(t.shape) for t in present)
        return (dx, *zeros, None if skip_proj is None else skip_proj.new_zeros(skip_proj.shape))  # type: ignore[return-value]
    limits = limits or limits_of(x.device)
    proxies = Proxy(proxy)
    all_weights = projections(tap_proj, lam_proj, u_proj, skip_proj)
    h, g = (torch.empty_like(dx, dtype=torch.float32) for _ in range(2))
    total = dx if dx.dtype == torch.float32 or len(directions) == 1 else torch.empty_like(dx, dtype=torch.float32)
    dtap, dlam, du = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (tap_proj, lam_proj, u_proj))
    dskip = None
    dproxy = None
    for d, direction in enumerate(directions):
        for source, out, adjoint in ((x, h, False), (grad, g, True)):
            plan = plan_scan(source, out, all_weights, d, direction, segment, limits, adjoint=adjoint)
            prepare_scan(plan, source, None, out, proxies, all_weights, direction).run()
        weights = all_weights.of(d)
        before, out = None if d == 0 else total, dx if d == len(directions) - 1 else total
        launch, dproxy, sums = prepare_gradients(
            x, grad, h, g, before, out, proxies.rows, weights, dproxy, direction, segment
        )
        launch.run()
        groups, _, states = weights.taps.shape
        of_maps = sums.sum(0)  # [5 or 6, C, S]
        dtap[d] = of_maps[:3].view(3, groups, -1, states).sum(2).transpose(0, 1)
        dlam[d], du[d] = of_maps[3], of_maps[4]
        if weights.skip is not None:
            dskip = of_maps[5].clone()
    of_proxy = torch.empty_like(proxy)
    if dproxy is not None:
        of_proxy.copy_(dproxy.sum(0))
    return dx, of_proxy, dtap, dlam, du, dskip
