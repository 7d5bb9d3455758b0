"""Prepares the launches of ``gradients_kernel``, and adds up what its programs write."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..directions import scan_axes
from . import interpreted
from .gradients_kernels import factors_kernel, gradients_kernel
from .launch import Launch
from .planner import Plan

_PROGRAMS = 132 * 8
"""Warps that a large card holds with 255 registers a thread; constant, for the order of the sums."""

_STATES = 256 << 20
"""Bytes that the states of all directions may take. A larger image takes one direction after the other."""

_TILE = 16
"""Channels, and pixels, of a tile."""


def _strides(name: str, image: Tensor) -> dict[str, int]:
    axes = zip(("batch", "channel", "row", "column"), image.stride(), strict=True)
    return {f"s_{name}_{axis}": stride for axis, stride in axes}


class Gradients:
    """The gradients of all directions, launch by launch: the states of a launch's directions have to be known.

    ``rows [B, S, H, W]`` is the proxy, contiguous, and ``largest [>= S]`` the largest absolute value of each of its
    channels. The projections are contiguous. All tensors may be on the meta device.
    """

    def __init__(
        self, x: Tensor, grad: Tensor, rows: Tensor, largest: Tensor, tap_proj: Tensor, lam_proj: Tensor,
        u_proj: Tensor, skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None,
    ) -> None:  # fmt: skip
        self.directions = directions
        self.dx = dx = torch.empty_like(x)
        count, channels = lam_proj.shape[:2]
        batch, states, height, width = rows.shape
        size = dx.numel()
        self.together = count if 2 * count * 4 * size <= _STATES else 1
        """Directions of a launch."""
        of_launch = ((self.together, *dx.shape), (size, *dx.stride()))
        self.h, self.g = (torch.empty_strided(*of_launch, dtype=torch.float32, device=x.device) for _ in range(2))
        """``[together, B, C, H, W]``: where the states and adjoint states of a launch have to be."""

        # As many sums for the proxy as take half the memory of an image.
        blocks = math.ceil(channels / _TILE)
        span_blocks = math.ceil(blocks / max(min(blocks, channels // (2 * states)), 1))
        spans = math.ceil(blocks / span_blocks)
        image_tiles = math.ceil(height * width / _TILE)
        tiles = batch * image_tiles
        run = math.ceil(tiles / max(_PROGRAMS // spans, 1))
        proxy_channels = 8 if states <= 8 else 16
        grid = (math.ceil(tiles / run), spans, math.ceil(states / proxy_channels))
        self._dproxy = rows.new_empty((spans, *rows.shape), dtype=torch.float32)
        self._lengths = [3 * lam_proj.numel(), lam_proj.numel(), u_proj.numel()]
        self._lengths += [] if skip_proj is None else [skip_proj.numel()]
        self._sums = rows.new_empty((grid[0], sum(self._lengths)), dtype=torch.float32)
        self._shapes = tap_proj.shape, lam_proj.shape, u_proj.shape

        cuda = torch.version.hip is None
        size_of_factors = 1536 * math.ceil(states / 8) + 192 * proxy_channels * grid[2]
        shared = dict(S=states, WIDTH=proxy_channels, SIZE=size_of_factors, TF32=cuda)
        written = {
            "p_factors": rows.new_empty((count, blocks, size_of_factors), dtype=torch.float32),
            "p_large": rows.new_empty((count, blocks), dtype=torch.float32),
        }
        projections = {"p_taps": tap_proj, "p_lam": lam_proj, "p_u": u_proj, "p_skip": skip_proj, "p_largest": largest}
        integers = {"n_channels": channels, "n_groups": tap_proj.shape[1]}
        self._factors = Launch(factors_kernel, Plan((blocks, count), 1, shared, integers), {**projections, **written})

        half = dx.dtype != torch.float32 and count > 1
        total = torch.empty_like(dx, dtype=torch.float32) if half else None
        self._tensors = {
            "p_x": x, "p_grad": grad, "p_dx": dx, "p_total": total,
            "p_h": self.h, "p_g": self.g, "p_proxy": rows, "p_dproxy": self._dproxy, **written, "p_sums": self._sums,
        }  # fmt: skip
        integers = {
            **_strides("x", x), **_strides("grad", grad), **_strides("dx", dx), "s_direction": size,
            "n_channels": channels, "n_rows": height, "n_columns": width,
            "n_segment": segment, "n_image_tiles": image_tiles, "n_tiles": tiles, "n_run": run,
            "n_span_blocks": span_blocks, "n_all": count,
        }  # fmt: skip
        extent = max(
            states * (height * width + _TILE),
            *(_TILE * abs(c) + height * abs(i) + width * abs(j) for _, c, i, j in (t.stride() for t in (x, grad, dx))),
        )
        uniform = len({t.stride() for t in (x, grad, dx)}) == 1
        constants = dict(
            UNIFORM=uniform, WIDE=extent >= 2**31, NARROW=width < _TILE, SEGMENTED=segment is not None,
            SKIP=skip_proj is not None, PTX=cuda and not interpreted(), **shared,
        )  # fmt: skip
        self._plan = Plan(grid, 1, constants, integers)

    def __iter__(self) -> Iterator[tuple[list[tuple[int, Tensor, Tensor]], list[Launch]]]:
        """Launches, and the directions whose states they need first: their number and where these go."""
        self._factors.run()
        for first in range(0, len(self.directions), self.together):
            count = min(self.together, len(self.directions) - first)
            axes = [scan_axes(name) for name in self.directions[first : first + count]]
            bits = sum(((axis.line == -1) + 2 * axis.reverse) << 2 * i for i, axis in enumerate(axes))
            of_launch = {"n_directions": count, "i_first_direction": first, "i_axes": bits}
            integers = {**self._plan.integers, **of_launch}
            launches = []
            for of_taps in (False, True):
                plan = Plan(self._plan.grid, 1, {"OF_TAPS": of_taps, **self._plan.constants}, integers)
                unused = dict.fromkeys(("p_x", "p_grad", "p_dx", "p_total") if of_taps else ())
                launches.append(Launch(gradients_kernel, plan, {**self._tensors, **unused}))
            yield [(first + i, self.h[i], self.g[i]) for i in range(count)], launches

    def results(self, proxy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """``dx, dproxy, dtap_proj, dlam_proj, du_proj, dskip_proj``, after all launches; ``dproxy`` like ``proxy``."""
        dproxy, like = self._dproxy.sum(0), torch.empty_like(proxy)
        if (dproxy.dtype, dproxy.stride()) != (like.dtype, like.stride()):
            dproxy = like.copy_(dproxy)
        of_taps, *of_gates = self._sums.split(self._lengths, dim=1)
        (count, groups, _, states), gates, _ = self._shapes
        dtap = of_taps.view(-1, count, groups, gates[1] // groups, 3, states).sum((0, 3))
        dlam, du = (t.sum(0).view(gates) for t in of_gates[:2])
        dskip = of_gates[2].sum(0).view(gates[1:]) if len(of_gates) == 3 else None
        return self.dx, dproxy, dtap, dlam, du, dskip
