"""The proxy of ``propagate``, and its copies that the scans read."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch
from .planner import Plan
from .proxy_kernels import pack_kernel

_BLOCK = 512
"""Pixels that a program packs, those of four channels."""


class _Chunks(NamedTuple):
    """How a row is cut, and what for."""

    pixels: int
    """Those of a chunk."""
    pitch: int
    """For how many chunks there is room."""
    parts: int = 0
    """For tensor cores the numbers that a lane reads of a pixel: one for every four channels, or two of float32."""


class Proxy:
    """The proxy ``[B, S, H, W]``, and its copies for the scans, float32 ``[B, lines, pixels, S' / 4, chunks, 4]``.

    ``S'`` is the next multiple of 4. A row is cut into chunks, the last one filled up with zeros. Tensor cores read
    ``[B, lines, chunks of a pixel, 4, parts]``.
    """

    def __init__(self, proxy: Tensor) -> None:
        self._proxy = proxy
        self._packed: dict[tuple[int, _Chunks], Tensor] = {}
        self._largest: Tensor | None = None

    @functools.cached_property
    def rows(self) -> Tensor:
        """The proxy, contiguous."""
        return self._proxy.contiguous()

    @property
    def largest(self) -> Tensor | None:
        """``[S']``: the largest absolute value of each channel; None before it is packed."""
        return self._largest

    def packed(self, line: int, plan: Plan) -> Tensor:
        """The copy for a scan with lines along axis ``line``; made when the first scan wants it."""
        chunks = _chunks_of(plan)
        if (line, chunks) not in self._packed:
            self._pack({line: chunks})
        return self._packed[line, chunks]

    def pack(self, plans: Mapping[int, Plan]) -> None:
        """Make the copies for the plans of scans by the axis of their lines, together."""
        self._pack({line: _chunks_of(plan) for line, plan in plans.items()})

    def _pack(self, chunks: Mapping[int, _Chunks]) -> None:
        proxy = self._proxy
        rows, columns = chunks.get(-2), chunks.get(-1)
        plan, shapes = _plan_pack(proxy.shape, proxy.stride(), rows, columns)
        new_rows, new_columns = (None if s is None else proxy.new_empty(s, dtype=torch.float32) for s in shapes)
        first = self._largest is None
        if first:
            self._largest = proxy.new_zeros(-(-proxy.shape[1] // 4) * 4, dtype=torch.float32)
        tensors = {
            "p_proxy": proxy, "p_rows": new_rows, "p_columns": new_columns,
            "p_largest": self._largest if first else None,
        }  # fmt: skip
        Launch(pack_kernel, plan, tensors).run()
        for line, packed in ((-2, new_rows), (-1, new_columns)):
            if packed is not None:
                self._packed[line, chunks[line]] = packed


def _chunks_of(plan: Plan) -> _Chunks:
    c = plan.constants
    return _Chunks(1, 8 * c["TILES"], c["PARTS"]) if "TILES" in c else _Chunks(c["PIXELS"], c["PITCH"])


@functools.lru_cache(maxsize=4096)
def _plan_pack(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: _Chunks | None, columns: _Chunks | None
) -> tuple[Plan, list[tuple[int, ...] | None]]:
    """The launch of ``pack_kernel``, and the shapes of what it writes."""
    batch, proxy_channels, height, width = shape
    fours = math.ceil(proxy_channels / 4)
    integers: dict[str, int | None] = dict(zip(("s_batch", "s_channel", "s_row", "s_column"), strides, strict=True))
    integers |= {"n_height": height, "n_width": width}
    constants = {"S": proxy_channels, "BLOCK": _BLOCK}
    shapes: list[tuple[int, ...] | None] = []
    most = 0
    for name, chunks, lines, cross in (("row", rows, height, width), ("column", columns, width, height)):
        how = chunks or _Chunks(1, 1)
        pixels, pitch, parts = how
        n_chunks = pitch if parts else math.ceil(cross / pixels)
        integers[f"n_{name}_chunks"] = n_chunks
        constants |= {f"{name.upper()}_{key.upper()}": size for key, size in how._asdict().items()}
        shape = (batch, lines, pitch, 4, parts) if parts else (batch, lines, pixels, fours, pitch, 4)
        shapes.append(None if chunks is None else shape)
        most = max(most, lines * pixels * n_chunks)
    return Plan((math.ceil(most / _BLOCK), batch, fours), _BLOCK // 128, constants, integers), shapes
