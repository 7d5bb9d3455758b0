"""Plans and launches of the gradients of ``propagate``, and the sums over what their programs write."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..directions import scan_axes
from ..valid_size import empty_or_zeros, in_scan_order
from .gradients_kernels import factors_kernel, gradients_kernel
from .launch import Launch
from .planner import Plan

_PROGRAMS = 132 * 8
"""Warps that a large card holds with 255 registers a thread; constant, for the order of the sums."""

_STATES = 256 << 20
"""Bytes that the states of all directions may take. A larger image takes one direction after the other."""

_TILE = 16
"""Channels, and pixels, of a tile."""

_Ints = tuple[int, ...]


class _Plans(NamedTuple):
    """All about the launches but their tensors."""

    together: int
    """Directions of a launch."""
    spans: int
    """Sums of the proxy's gradient."""
    factors: Plan
    gradients: list[tuple[Plan, Plan]]
    """For each launch of some directions that of gates and that of taps."""


def directions_of_launch(elements: int, count: int) -> int:
    """How many of ``count`` directions of an image a launch takes: all, or one where their states are too many."""
    return count if 2 * count * 4 * elements <= _STATES else 1


def _strides(name: str, strides: _Ints) -> dict[str, int | None]:
    axes = zip(("batch", "channel", "row", "column"), strides, strict=True)
    return {f"s_{name}_{axis}": stride for axis, stride in axes}


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: _Ints, x: _Ints, grad: _Ints, dx: _Ints, states: int, groups: int, skip: bool, directions: tuple[str, ...],
    segment: int | None, ptx: bool, together: int, programs: int,
) -> _Plans:  # fmt: skip
    """The plans for an image of this shape and these strides: launches of so many directions and programs."""
    batch, channels, height, width = shape
    size, count = math.prod(shape), len(directions)
    # As many sums for the proxy as take half the memory of an image.
    blocks = math.ceil(channels / _TILE)
    span_blocks = math.ceil(blocks / max(min(blocks, channels // (2 * states)), 1))
    spans = math.ceil(blocks / span_blocks)
    image_tiles = math.ceil(height * width / _TILE)
    tiles = batch * image_tiles
    run = math.ceil(tiles / max(programs // spans, 1))
    proxy_channels = 8 if states <= 8 else 16
    grid = (math.ceil(tiles / run), spans, math.ceil(states / proxy_channels))

    size_of_factors = 1536 * math.ceil(states / 8) + 192 * proxy_channels * grid[2]
    shared = dict(S=states, WIDTH=proxy_channels, SIZE=size_of_factors, TF32=torch.version.hip is None)
    factors = Plan((blocks, count), 1, shared, {"n_channels": channels, "n_groups": groups})

    extents = (_TILE * abs(c) + height * abs(i) + width * abs(j) for _, c, i, j in (x, grad, dx))
    constants = dict(
        UNIFORM=x == grad == dx, WIDE=max(states * (height * width + _TILE), *extents) >= 2**31, NARROW=width < _TILE,
        SEGMENTED=segment is not None, SKIP=skip, PTX=ptx, **shared,
    )  # fmt: skip
    integers = {
        **_strides("x", x), **_strides("grad", grad), **_strides("dx", dx), "s_direction": size,
        "n_channels": channels, "n_rows": height, "n_columns": width, "n_segment": segment,
        "n_image_tiles": image_tiles, "n_tiles": tiles, "n_run": run, "n_span_blocks": span_blocks, "n_all": count,
    }  # fmt: skip
    plans = []
    for first in range(0, count, together):
        axes = [scan_axes(name) for name in directions[first : first + together]]
        bits = sum(((axis.line == -1) + 2 * axis.reverse) << 2 * i for i, axis in enumerate(axes))
        some = {**integers, "n_directions": len(axes), "i_first_direction": first, "i_axes": bits}
        gates, taps = (Plan(grid, 1, {"OF_TAPS": of_taps, **constants}, some) for of_taps in (False, True))
        plans.append((gates, taps))
    return _Plans(together, spans, factors, plans)


class Gradients:
    """The gradients of all directions, launch by launch: the states of a launch's directions have to be known.

    ``rows [B, S, H, W]`` is the proxy, contiguous, and ``largest [>= S]`` the largest absolute value of each of its
    channels. The projections are contiguous. All tensors may be on the meta device.
    """

    def __init__(
        self, x: Tensor, grad: Tensor, rows: Tensor, largest: Tensor | None, tap_proj: Tensor, lam_proj: Tensor,
        u_proj: Tensor, skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, ptx: bool,
        valid_size: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.dx = dx = empty_or_zeros(x, valid_size)
        together = directions_of_launch(x.numel(), len(directions))
        how = (rows.shape[1], tap_proj.shape[1], skip_proj is not None, directions, segment, ptx, together, _PROGRAMS)
        self._plans = plans = _plan(x.shape, x.stride(), grad.stride(), dx.stride(), *how)
        self._shapes = tap_proj.shape, lam_proj.shape
        of_launch = (plans.together, *dx.shape), (dx.numel(), *dx.stride())
        self._states = [torch.empty_strided(*of_launch, dtype=torch.float32, device=x.device) for _ in range(2)]
        self._dproxy = rows.new_empty((plans.spans, *rows.shape), dtype=torch.float32)
        self._lengths = [3 * lam_proj.numel(), lam_proj.numel(), u_proj.numel()]
        self._lengths += [] if skip_proj is None else [skip_proj.numel()]
        programs = plans.gradients[0][0].grid[0]
        self._sums = rows.new_empty((programs, sum(self._lengths)), dtype=torch.float32)

        blocks, count = plans.factors.grid
        written = {
            "p_factors": rows.new_empty((count, blocks, plans.factors.constants["SIZE"]), dtype=torch.float32),
            "p_large": rows.new_empty((count, blocks), dtype=torch.float32),
        }
        projections = {"p_taps": tap_proj, "p_lam": lam_proj, "p_u": u_proj, "p_skip": skip_proj, "p_largest": largest}
        self._factors = Launch(factors_kernel, plans.factors, {**projections, **written})
        half = dx.dtype != torch.float32 and count > 1
        # Taps have nothing to do with images.
        self._images: dict[str, Tensor | None] = {
            "p_x": x, "p_grad": grad, "p_dx": dx,
            "p_total": torch.empty_like(dx, dtype=torch.float32) if half else None,
        }  # fmt: skip
        self._others: dict[str, Tensor | None] = {
            "p_h": self._states[0], "p_g": self._states[1], "p_proxy": rows, "p_dproxy": self._dproxy, **written,
            "p_sums": self._sums, "p_sizes": in_scan_order(valid_size, -2),
        }  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, tuple[Tensor, Tensor], list[Launch]]]:
        """For some directions the number of the first, where states and adjoint states go, and the launches they need.

        States are ``[directions, B, C, H, W]``.
        """
        self._factors.run()
        tensors = [{**self._images, **self._others}, {**dict.fromkeys(self._images), **self._others}]
        for i, plans in enumerate(self._plans.gradients):
            count = plans[0].integers["n_directions"]
            launches = [Launch(gradients_kernel, *each) for each in zip(plans, tensors, strict=True)]
            yield i * self._plans.together, (self._states[0][:count], self._states[1][:count]), launches

    def results(self, proxy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """``dx, dproxy, dtap_proj, dlam_proj, du_proj, dskip_proj``, after all launches; ``dproxy`` like ``proxy``."""
        dproxy, like = self._dproxy.sum(0), torch.empty_like(proxy)
        if (dproxy.dtype, dproxy.stride()) != (like.dtype, like.stride()):
            dproxy = like.copy_(dproxy)
        of_taps, *of_gates = self._sums.split(self._lengths, dim=1)
        (count, groups, _, states), gates = self._shapes
        dtap = of_taps.view(-1, count, groups, gates[1] // groups, 3, states).sum((0, 3))
        dlam, du = (t.sum(0).view(gates) for t in of_gates[:2])
        dskip = of_gates[2].sum(0).view(gates[1:]) if len(of_gates) == 3 else None
        return self.dx, dproxy, dtap, dlam, du, dskip
