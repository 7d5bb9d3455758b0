"""Compiles kernels for cards that need not be here; test_aot.py runs this in processes without the interpreter.

What is compiled is what calls would launch, recorded on the meta device.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from gspn.bench.gpu_cases import Case
from gspn.bench.gpu_counts import compile_launch, launch_row, pretend
from gspn.bench.gpu_model import CARDS
from gspn.ops.triton.launch import Launch, recorded
from gspn.ops.triton.line_scan import line_scan, line_scan_backward
from gspn.ops.triton.planner import Limits

Chosen = list[tuple[dict[str, Any], list[int]]]
"""Arguments of a :class:`gspn.bench.gpu_cases.Case`, and which of the launches of that call."""


def report(chosen: Chosen, arch: int) -> None:
    """Print the counts of each launch as JSON, and all accesses of global memory by opcode and bytes."""
    rows = []
    for case, indices in chosen:
        launches, _ = Case(**case).call(CARDS[arch])
        for launch in (launches[i] for i in indices):
            compiled = compile_launch(launch, arch)
            code = [one for one in compiled.kernel.instructions() if one.kind == "global"]
            accesses = Counter(f"{one.name} {one.bytes}" for one in code)
            rows.append({**launch_row(launch, compiled, arch), "case": Case(**case).name, "accesses": accesses})
    json.dump(rows, sys.stdout)


def for_amd(chosen: Chosen, arch: str, warp_size: int) -> None:
    """Print the local memory in bytes that each launch takes, compiled for an AMD GPU."""
    torch.version.hip = "6.4"
    pretend("hip", arch, warp_size)
    results = []
    for case, indices in chosen:
        launches, _ = Case(**case).call(replace(CARDS[90], shared_memory=64 << 10))
        for launch in (launches[i] for i in indices):
            compiled = launch.kernel.warmup(**launch.arguments(), grid=launch.plan.grid)
            local = re.search(r"group_segment_fixed_size: (\d+)", compiled.asm["amdgcn"])
            assert local is not None
            results.append((Case(**case).name, launch.kernel.__name__, int(local.group(1))))
    json.dump(results, sys.stdout)


def one_compilation_for_all_sizes() -> None:
    """The launches of other sizes find the kernel that the first has had compiled."""
    pretend("cuda", 90, 32)
    for backward in (False, True):
        kernels = set()
        for size in ((16, 8, 1024, 1024), (3, 7, 1000, 996), (1, 200, 1, 516), (1, 1, 33, 1020)):
            launch = _line_scan(size, backward)
            kernels.add(launch.kernel.warmup(**launch.arguments(), grid=(1,)))
        assert len(kernels) == 1, kernels


def _line_scan(shape: tuple[int, ...], backward: bool) -> Launch:
    batch, channels, height, width = shape
    x = torch.empty(shape, device="meta")
    taps = torch.empty(batch, channels, 3, height, width, device="meta")
    with recorded() as launches:
        if backward:
            line_scan_backward(x, x, x, taps, x, "down", None, True, True, Limits())
        else:
            line_scan(x, taps, x, "down", None, Limits())
    (launch,) = launches
    return launch
