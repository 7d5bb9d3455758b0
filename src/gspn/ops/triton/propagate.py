r"""``propagate`` and its gradients by the Triton kernels: plans and launches.

What a call must do, with N the pixels of ``x``, S the channels of the proxy and D directions: it reads ``x`` and the
proxy and writes ``y``, 2 N and N S / C numbers; it takes (5 S + 4) D N multiply-adds, those of three logits and two
gates and of the scan (plus S + 1 with a skip), 3 D N exponentials and 4 D N reciprocals. All instructions count, not
these alone: some 90 a pixel and direction with S = 8, more than the time in which memory moves what it has to.

On data-centre cards the maps of rows of up to 128 pixels are matrix products on tensor cores, in
:mod:`.warp_scan_kernels`: some 35 instructions, of which seven are special functions, whose units are then the limit.

**Forward**, D + 1 launches. The first packs the proxy. The directions follow each other and add to ``y`` in place, so
that the order of the sum is fixed: D reads of ``x``, 2 D - 1 of and to ``y``. For bfloat16 and float16 what is added to
is a float32 tensor of the size of ``x``, and the last direction writes ``y``. Nothing else is kept but copies of the
proxy in float32: one with rows along the width, one with rows along the height for ``"right"`` and ``"left"``. The
projections are read as they are. On the host a call looks its plans up and launches what was compiled for them.

Where there are too few rows to fill a card, three launches: all directions side by side, each to a float32 result of
its own, and their sum in the same order. The time is then that of latencies, and more bytes do not matter.

**Backward**: the states again and the adjoint states, a launch each for each direction, or for all of them where there
are few rows; and the gradients of all pixels side by side, two launches for all directions whose states fit memory at
once; see :mod:`.gradients`. Memory beside the results, in numbers of 4 bytes: the states and the adjoint states, 2 N,
or 2 D N up to 256 MB; for half types the sum of ``dx`` over the directions, N; for the proxy's gradient a sum per span
of channel blocks, at most max(N / 2, that of one proxy); for the projections' a sum per program,
``[programs, 5 D + 1, C, S]``, with about 1000 programs over all blocks of channels. These are added up in a fixed
order, so that results are the same bits on every run.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..directions import scan_axes
from ..valid_size import empty_or_zeros, in_scan_order, within
from .gradients import Gradients, directions_of_launch
from .launch import Launch, limits_of, scratch
from .planner import Limits, Plan, Sizes, Strides, plan_propagate, plan_together
from .proxy import Proxy
from .scan_kernels import scan_kernel, sum_kernel


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


def projections(tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None) -> Projections:
    """The projections, as the kernels read them."""
    skip = None if skip_proj is None else skip_proj.contiguous()
    return Projections(tap_proj.contiguous(), lam_proj.contiguous(), u_proj.contiguous(), skip)


def plan_scan(
    source: Tensor, out: Tensor, weights: Projections, d: int, direction: str, segment: int | None, limits: Limits, *,
    adjoint: bool = False, gated: bool = False, padded: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a scan of ``source [B, C, H, W]`` to ``out`` by the ``d``-th projections.

    The gate of what goes in is lam, for an adjoint scan u; what comes out is multiplied by u if ``gated``, and the skip
    added by the first one. ``padded``: images may be smaller than their maps. The tensors may be on the meta device.
    """
    _, groups, _, states = weights.taps.shape
    how = (source.element_size(), groups, states, d, direction, segment, limits, adjoint, gated, padded)
    return _plan_scan(source.shape, source.stride(), out.stride(), *how)


@functools.lru_cache(maxsize=4096)
def _plan_scan(
    shape: tuple[int, ...], source: tuple[int, ...], out: tuple[int, ...], itemsize: int, groups: int, states: int,
    d: int, direction: str, segment: int | None, limits: Limits, adjoint: bool, gated: bool, padded: bool,
) -> Plan:  # fmt: skip
    batch, channels, *_ = shape
    axes = scan_axes(direction)
    views = (
        (name, Strides(strides[0], strides[1], strides[axes.cross], strides[axes.line]))
        for name, strides in (("in", source), ("out", out))
    )
    return plan_propagate(
        Sizes(batch, channels, groups, shape[axes.cross], shape[axes.line]), tuple(views), itemsize, states,
        reverse=axes.reverse, segment=segment, limits=limits, direction=d, adjoint=adjoint, gated=gated, padded=padded,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan_together(
    shape: tuple[int, ...], source: tuple[int, ...], out: tuple[int, ...], itemsize: int, groups: int, states: int,
    directions: tuple[str, ...], segment: int | None, limits: Limits, padded: bool, adjoint: bool = False,
    gated: bool = True,
) -> Plan | None:  # fmt: skip
    batch, channels, height, width = shape
    codes = [scan_axes(name).reverse + 2 * (scan_axes(name).line == -1) for name in directions]
    views = tuple((name, Strides(s[0], s[1], s[3], s[2])) for name, s in (("in", source), ("out", out)))
    return plan_together(
        Sizes(batch, channels, groups, width, height), views, itemsize, states, codes, segment=segment, limits=limits,
        adjoint=adjoint, gated=gated, padded=padded,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan_sum(elements: int, count: int) -> Plan:
    return Plan((math.ceil(elements / 1024),), 4, {"D": count, "BLOCK": 1024}, {"n": elements})


def prepare_scan(
    plan: Plan, source: Tensor, before: Tensor | None, out: Tensor, proxy: Proxy, weights: Projections,
    direction: str | None = None, valid_size: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch of a plan, which writes to ``out`` its sum with ``before``; without a direction that of several."""
    line = -2 if direction is None else scan_axes(direction).line
    skips = plan.constants["GATED"] and not plan.integers["i_direction"]
    tensors = {
        "p_in": source, "p_out": out, "p_before": before, "p_proxy": proxy.packed(line, plan),
        "p_largest": proxy.largest, "p_taps": weights.taps, "p_lam": weights.lam, "p_u": weights.u,
        "p_skip": weights.skip if skips else None,
    }  # fmt: skip
    if "TILES" in plan.constants:
        from .warp_scan_kernels import warp_scan_kernel  # Gluon, which not every Triton has

        return Launch(warp_scan_kernel, plan, tensors)
    tensors |= {
        "p_columns": proxy.packed(-1, plan) if direction is None else None, "p_states": scratch(plan, weights.lam),
        "p_sizes": in_scan_order(valid_size, line),
    }  # fmt: skip
    return Launch(scan_kernel, plan, tensors)


def propagate(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None, limits: Limits | None = None,
) -> Tensor:  # fmt: skip
    """``y``; see :func:`gspn.propagate`. ``limits`` is for tests."""
    y = empty_or_zeros(x, valid_size)
    if x.numel() == 0:
        return y
    limits = limits or limits_of(x.device)
    proxies, padded = Proxy(within(proxy, valid_size)), valid_size is not None
    weights = projections(tap_proj, lam_proj, u_proj, skip_proj)
    plan = _plan_together(
        x.shape, x.stride(), y.stride(), x.element_size(), weights.taps.shape[1], proxy.shape[1], directions, segment,
        limits, padded,
    )  # fmt: skip
    if plan is not None:
        proxies.pack({-2: plan, -1: plan})
        parts = y.new_empty((len(directions), y.numel()), dtype=torch.float32)
        parts = parts.zero_() if padded else parts
        prepare_scan(plan, x, None, parts, proxies, weights, None, valid_size).run()
        Launch(sum_kernel, _plan_sum(y.numel(), len(directions)), {"p_parts": parts, "p_out": y}).run()
        return y
    total = y if y.dtype == torch.float32 or len(directions) == 1 else torch.empty_like(y, dtype=torch.float32)
    plans = [
        plan_scan(x, y, weights, d, name, segment, limits, gated=True, padded=padded)
        for d, name in enumerate(directions)
    ]
    proxies.pack({scan_axes(name).line: plan for name, plan in zip(directions, plans, strict=True)})
    for d, (direction, plan) in enumerate(zip(directions, plans, strict=True)):
        before, out = None if d == 0 else total, y if d == len(directions) - 1 else total
        prepare_scan(plan, x, before, out, proxies, weights, direction, valid_size).run()
    return y


def propagate_backward(
    grad: Tensor, x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
    skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None,
    limits: Limits | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``dx, dproxy, dtap_proj, dlam_proj, du_proj, dskip_proj``. ``limits`` is for tests."""
    if x.numel() == 0:
        present = (proxy, tap_proj, lam_proj, u_proj)
        zeros = (torch.zeros_like(t) if t is proxy else t.new_zeros(t.shape) for t in present)
        return (torch.empty_like(x), *zeros, None if skip_proj is None else skip_proj.new_zeros(skip_proj.shape))  # type: ignore[return-value]
    limits = limits or limits_of(x.device)
    proxies, padded = Proxy(within(proxy, valid_size)), valid_size is not None
    weights = projections(tap_proj, lam_proj, u_proj, skip_proj)
    sources = (x, False), (grad, True)
    like_states = torch.empty_like(x, device="meta")
    pair = [
        _plan_together(
            x.shape, source.stride(), like_states.stride(), x.element_size(), weights.taps.shape[1], proxy.shape[1],
            directions, segment, limits, padded, adjoint, False,
        )
        for source, adjoint in sources
    ]  # fmt: skip
    beside = [plan for plan in pair if plan is not None]
    together = len(beside) == 2 and directions_of_launch(x.numel(), len(directions)) > 1
    in_turn = [
        [
            plan_scan(source, like_states, weights, d, name, segment, limits, adjoint=adjoint, padded=padded)
            for source, adjoint in sources
        ]
        for d, name in enumerate(() if together else directions)
    ]
    by_line = {scan_axes(name).line: plans[0] for name, plans in zip(directions, in_turn, strict=False)}
    proxies.pack(dict.fromkeys((-2, -1), beside[0]) if together else by_line)
    how = directions, segment, limits.ptx, valid_size
    gradients = Gradients(x, grad, proxies.rows, proxies.largest, *weights, *how)
    for first, states, launches in gradients:
        for i, (source, _) in enumerate(sources):
            if together:
                prepare_scan(beside[i], source, None, states[i], proxies, weights, None, valid_size).run()
            else:
                for d, out in enumerate(states[i], first):
                    prepare_scan(in_turn[d][i], source, None, out, proxies, weights, directions[d], valid_size).run()
        for launch in launches:
            launch.run()
    return gradients.results(proxy)
