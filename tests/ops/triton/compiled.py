"""Compiles kernels for cards that need not be here; test_aot.py runs this in processes without the interpreter.

What is compiled is what calls would launch, recorded on the meta device.
"""

from __future__ import annotations

import json
import re
import sys
import timeit
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from propagate_support import make_arguments

from gspn.bench.gpu_cases import Case, OtherLaunches
from gspn.bench.gpu_counts import compile_launch, launch_row, pretend
from gspn.bench.gpu_model import CARDS
from gspn.ops.triton.launch import Launch, limits_of, recorded
from gspn.ops.triton.line_scan import line_scan, line_scan_backward
from gspn.ops.triton.planner import Limits
from gspn.ops.triton.propagate import propagate, propagate_backward
from gspn.ops.triton.proxy_kernels import pack_kernel

Chosen = list[tuple[dict[str, Any], list[int]]]
"""Arguments of a :class:`gspn.bench.gpu_cases.Case`, and which of the launches of that call."""


def report(chosen: Chosen, arch: int, tensor_cores: bool = False) -> None:
    """Print the counts of each launch as JSON, and all accesses of global memory by opcode and bytes."""
    rows = []
    limits = Limits(CARDS[arch].shared_memory, tensor_cores=tensor_cores)
    for case, indices in chosen:
        launches = [one for one in Case(**case).call(CARDS[arch], limits)[0] if one.kernel is not pack_kernel]
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


def images_of_several_sizes(arch: int) -> None:
    """Print as JSON the bytes of stack that each kernel takes with the sizes of images."""
    sizes, (grad, *arguments) = (
        torch.empty(16, 2, dtype=torch.int64, device="meta"),
        make_arguments(16, 96, 56, 56, 8, 1),
    )
    grad, *arguments = (one.to("meta") if isinstance(one, torch.Tensor) else one for one in (grad, *arguments))
    x, taps = grad, torch.empty(16, 96, 3, 56, 56, device="meta")
    with recorded() as launches:
        line_scan(x, taps, x, "left", None, sizes, Limits())
        line_scan_backward(x, x, x, taps, x, "down", None, True, True, sizes, Limits())
        propagate(*arguments, limits=Limits(), valid_size=sizes)
        propagate_backward(grad, *arguments, limits=Limits(), valid_size=sizes)
    # Of alike launches the first; those before the scans, which are as without sizes, are left out.
    chosen = {}
    for launch in launches:
        if "p_sizes" in launch.tensors:
            how = launch.plan.constants.get("ADJOINT"), launch.plan.constants.get("OF_TAPS")
            chosen.setdefault((launch.kernel.__name__, *how), launch)
    json.dump([(str(key), compile_launch(launch, arch).stack) for key, launch in chosen.items()], sys.stdout)


def host_work() -> None:
    """Print as JSON what calls of propagate do on the host, once they are compiled, with launches that do nothing.

    By pass: Triton launches, PyTorch's operations that would launch a kernel, calls of functions, microseconds.
    """
    pretend("cuda", 90, 32)
    launched = []

    class Utils:
        def load_binary(self, *_arguments: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024

        def unload_module(self, _module: int) -> None: ...

        def get_device_properties(self, _device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10}

    driver = triton.runtime.driver.active
    driver.utils, driver.launcher_cls = Utils(), lambda _src, _metadata: lambda *_arguments: launched.append(1)  # type: ignore[attr-defined]
    grad, *arguments = make_arguments(2, 32, 7, 7, 8, 32)
    in_turn, results = limits_of(grad.device)._replace(together=False), {}
    for name, call in (
        ("side by side", lambda: propagate(*arguments)),
        ("in turn", lambda: propagate(*arguments, limits=in_turn)),
        ("backward", lambda: propagate_backward(grad, *arguments)),
    ):
        call()
        launched.clear()
        with OtherLaunches() as others:
            call()
        calls = Counter(e for e in _events(call) if e in ("call", "c_call"))
        times = sorted(timeit.repeat(call, number=1, repeat=100))
        results[name] = [len(launched) // 102, others.count, calls.total(), 1e6 * times[10]]
    json.dump(results, sys.stdout)


def _events(call: Callable[[], Any]) -> list[str]:
    """The events that the interpreter tells a profiler."""
    events: list[str] = []
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    try:
        call()
    finally:
        sys.setprofile(None)
    return events


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
            line_scan_backward(x, x, x, taps, x, "down", None, True, True, limits=Limits())
        else:
            line_scan(x, taps, x, "down", None, limits=Limits())
    (launch,) = launches
    return launch
