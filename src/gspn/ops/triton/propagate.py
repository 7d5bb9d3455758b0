r"""``propagate`` and its gradients by the Triton kernels: plans and launches one direction after the other.

What a call must do, with N the pixels of ``x``, S the channels of the proxy and D directions: it reads ``x`` and the
proxy and writes ``y``, 2 N and N S / C numbers; it takes (5 S + 4) D N multiply-adds, those of three logits and two
gates and of the scan (plus S + 1 with a skip), 3 D N exponentials and 4 D N reciprocals. All instructions count, not
these alone: some 90 a pixel and direction with S = 8, more than the time in which memory moves what it has to.

**Forward**, D launches. The directions follow each other and add to ``y`` in place, so that the order of the sum is
fixed: D reads of ``x``, 2 D - 1 of and to ``y``. For bfloat16 and float16 what is added to is a float32 tensor of the
size of ``x``, and the last direction writes ``y``. Nothing else is kept but copies of the proxy in float32: one with
rows along the width, one with rows along the height for ``"right"`` and ``"left"``.

**Backward**: the states again and the adjoint states, a launch each for each direction, and the gradients of all pixels
side by side, two launches for all directions whose states fit memory at once; see :mod:`.gradients`. Memory beside the
results, in numbers of 4 bytes: the states and the adjoint states, 2 N, or 2 D N up to 256 MB; for half types the sum of
``dx`` over the directions, N; for the proxy's gradient a sum per span of channel blocks, at most max(N / 2, that of one
proxy); for the projections' a sum per program, ``[programs, 5 D + 1, C, S]``, with about 1000 programs over all blocks
of channels. These are added up in a fixed order, so that results are the same bits on every run.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..directions import scan_axes
from . import interpreted
from .gradients import Gradients
from .launch import Launch, limits_of, scratch, sizes_of, strides_of
from .planner import Limits, plan_propagate
from .scan_kernels import scan_kernel


@dataclass(frozen=True)
class Projections:
    """Those of one direction, contiguous. For the scans they are packed; with ``S'`` the next multiple of 4."""

    taps: Tensor
    """``[G, 3, S]``"""
    lam: Tensor
    """``[C, S]``"""
    u: Tensor
    """``[C, S]``"""
    skip: Tensor | None
    """``[C, S]``, for the one direction that takes care of it."""
    maps: Tensor
    """``[C, 5, S']``: the three taps, lam and u."""
    skip_map: Tensor | None
    """``[C, S']``"""


def projections(
    tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None, count: int
) -> list[Projections]:
    """The projections of each direction; the first has the skip."""
    taps, lam, u = (t.contiguous() for t in (tap_proj, lam_proj, u_proj))
    maps = _in_fours(torch.cat((_of_channels(taps, lam.shape[1]), lam.unsqueeze(2), u.unsqueeze(2)), dim=2))
    skip = None if skip_proj is None else skip_proj.contiguous()
    skip_map = None if skip is None else _in_fours(skip)
    first = [Projections(taps[0], lam[0], u[0], skip, maps[0], skip_map)] if count else []
    return first + [Projections(taps[d], lam[d], u[d], None, maps[d], None) for d in range(1, count)]


def _in_fours(t: Tensor) -> Tensor:
    """The last axis filled up with zeros to a multiple of 4."""
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % 4)) if t.shape[-1] % 4 else t


def _of_channels(taps: Tensor, channels: int) -> Tensor:
    """``[.., G, 3, S]`` to ``[.., C, 3, S]``."""
    groups, _, states = taps.shape[-3:]
    return taps.unsqueeze(-3).expand(*taps.shape[:-3], groups, channels // groups, 3, states).flatten(-4, -3)


class Proxy:
    """The proxy ``[B, S, H, W]`` and its copies, which are made when the first scan wants them."""

    def __init__(self, proxy: Tensor) -> None:
        self._proxy = proxy
        self._packed: dict[tuple[int, int], Tensor] = {}

    @functools.cached_property
    def rows(self) -> Tensor:
        """The proxy, contiguous."""
        return self._proxy.contiguous()

    @functools.cached_property
    def largest(self) -> Tensor:
        """``[S']``: the largest absolute value of each channel."""
        return _in_fours(torch.linalg.vector_norm(self._proxy, math.inf, (0, 2, 3), dtype=torch.float32))

    def packed(self, line: int, pixels: int, pitch: int) -> Tensor:
        """For scans with lines along axis ``line``: float32 ``[B, lines, pixels, S' / 4, pitch, 4]``.

        A row is cut into chunks of so many pixels, the last one filled up with zeros; chunks up to ``pitch`` are room.
        """
        if (line, pixels) not in self._packed:
            p = self._proxy if line == -2 else self._proxy.mT
            batch, states, lines, cross = p.shape
            if states % 4 or cross % pixels:
                p = torch.nn.functional.pad(p, (0, -cross % pixels, 0, 0, 0, -states % 4))
            parts = p.unflatten(1, (-1, 4)).unflatten(4, (-1, pixels))  # [B, S' / 4, 4, lines, chunks, pixels]
            shape = (batch, lines, pixels, parts.shape[1], pitch, 4)
            packed = p.new_empty(shape, dtype=torch.float32)
            packed[..., : parts.shape[4], :] = parts.permute(0, 3, 5, 1, 4, 2)
            self._packed[line, pixels] = packed
        return self._packed[line, pixels]


def prepare_scan(
    source: Tensor, before: Tensor | None, out: Tensor, proxy: Proxy, weights: Projections, direction: str,
    segment: int | None, limits: Limits, *, adjoint: bool = False, gated: bool = False,
) -> Launch:  # fmt: skip
    """The launch that writes the scan of ``source [B, C, H, W]`` to ``out``, added to ``before``.

    The gate of what goes in is lam, for an adjoint scan u; what comes out is multiplied by u if ``gated``, and the skip
    added if there is one. The tensors may be on the meta device.
    """
    axes = scan_axes(direction)
    strides = (("in", strides_of(source, axes)), ("out", strides_of(out, axes)))
    plan = plan_propagate(
        sizes_of(source, weights.taps.shape[0], axes), strides, source.element_size(), weights.taps.shape[2],
        reverse=axes.reverse, segment=segment, limits=limits,
    )  # fmt: skip
    ptx = torch.version.hip is None and not interpreted()
    plan = replace(plan, constants={**plan.constants, "ADJOINT": adjoint, "GATED": gated, "PTX": ptx})
    tensors = {
        "p_in": source, "p_out": out, "p_before": before,
        "p_proxy": proxy.packed(axes.line, plan.constants["PIXELS"], plan.constants["PITCH"]),
        "p_largest": proxy.largest, "p_maps": weights.maps, "p_skip": weights.skip_map if gated else None,
        "p_states": scratch(plan, weights.maps),
    }  # fmt: skip
    return Launch(scan_kernel, plan, tensors)


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
    weights = projections(tap_proj, lam_proj, u_proj, skip_proj, len(directions))
    total = y if y.dtype == torch.float32 or len(directions) == 1 else torch.empty_like(y, dtype=torch.float32)
    for d, direction in enumerate(directions):
        before, out = None if d == 0 else total, y if d == len(directions) - 1 else total
        prepare_scan(x, before, out, proxies, weights[d], direction, segment, limits, gated=True).run()
    return y


def propagate_backward(
    grad: Tensor, x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
    skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, limits: Limits | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``dx, dproxy, dtap_proj, dlam_proj, du_proj, dskip_proj``. ``limits`` is for tests."""
    if x.numel() == 0:
        present = (proxy, tap_proj, lam_proj, u_proj)
        zeros = (torch.zeros_like(t) if t is proxy else t.new_zeros(t.shape) for t in present)
        return (torch.empty_like(x), *zeros, None if skip_proj is None else skip_proj.new_zeros(skip_proj.shape))  # type: ignore[return-value]
    limits = limits or limits_of(x.device)
    proxies = Proxy(proxy)
    weights = projections(tap_proj, lam_proj, u_proj, skip_proj, len(directions))
    gradients = Gradients(
        x, grad, proxies.rows, proxies.largest, tap_proj.contiguous(), lam_proj.contiguous(), u_proj.contiguous(),
        None if skip_proj is None else skip_proj.contiguous(), directions, segment,
    )  # fmt: skip
    for scans, launches in gradients:
        for d, h, g in scans:
            prepare_scan(x, None, h, proxies, weights[d], directions[d], segment, limits).run()
            prepare_scan(grad, None, g, proxies, weights[d], directions[d], segment, limits, adjoint=True).run()
        for launch in launches:
            launch.run()
    return gradients.results(proxy)
