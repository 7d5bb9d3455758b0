"""What test_propagate_aot.py runs in processes of their own: the kernels of propagate compiled for cards not here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from compiled import SHARED_MEMORY, build, resources

from gspn.ops.triton.planner import Limits
from gspn.ops.triton.propagate import Launch, Projections, prepare_gradients, prepare_scan


def launches(
    shape: tuple[int, int, int, int], states: int, groups: int, dtype: torch.dtype, direction: str, channels_last: bool,
    capability: int,
) -> dict[str, Launch]:  # fmt: skip
    """The launches of a direction that is not the only one, forward and backward, with all that they may do."""
    batch, channels, height, width = shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    wide = torch.empty_like(x, dtype=torch.float32)
    rows = torch.empty(batch, states, height, width, dtype=dtype, device="meta")
    across = rows if direction in ("down", "up") else rows.mT.contiguous()
    gate = torch.empty(channels, states, device="meta")
    weights = Projections(torch.empty(groups, 3, states, device="meta"), gate, gate, gate)
    dproxy = prepare_gradients(x, x, wide, wide, wide, wide, rows, weights, None, direction, None)[1]
    how = (weights, direction, None, Limits(SHARED_MEMORY[capability]))
    return {
        "forward": prepare_scan(x, wide, x, across, *how, gated=True),
        "states": prepare_scan(x, None, wide, across, *how),
        "adjoint": prepare_scan(x, None, wide, across, *how, adjoint=True),
        "gradients": prepare_gradients(x, x, wide, wide, wide, wide, rows, weights, dproxy, direction, None)[0],
    }


Case = tuple[tuple[int, int, int, int], int, int, str, str, bool]
"""Shape, S, G, dtype, direction, and whether it is channels_last."""


def report(cases: list[Case], capability: int, scratch: str, *which: str) -> None:
    """Print the resources of each case's launches, all or those named, as JSON."""
    results = []
    for shape, states, groups, dtype, direction, channels_last in cases:
        found = launches(shape, states, groups, getattr(torch, dtype), direction, channels_last, capability)
        for name, launch in found.items():
            if which and name not in which:
                continue
            plan = SimpleNamespace(constants=launch.constants, num_warps=launch.num_warps)
            what = SimpleNamespace(kernel=launch.kernel, tensors=launch.tensors, integers=launch.integers, plan=plan)
            used = resources(build(what, capability), Path(scratch))
            results.append(used | {"warps": launch.num_warps, "launch": name})
    json.dump(results, sys.stdout)
