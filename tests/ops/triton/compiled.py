"""Compiles kernels for cards that need not be here; test_aot.py runs this in processes without the interpreter.

What is compiled is what would be launched: the launcher's own plan and arguments, for tensors on the meta device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gspn.ops.triton.launch import Launch
from gspn.ops.triton.line_scan import prepare_backward, prepare_forward
from gspn.ops.triton.planner import Limits
from gspn.ops.triton.propagate import Proxy, prepare_gradients, prepare_scan, projections

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def line_scan(
    capability: int, shape: tuple[int, int, int, int], dtype: torch.dtype, direction: str, backward: bool
) -> Launch:
    """The launch for contiguous tensors with per-channel taps, a gate and, backward, every gradient."""
    batch, channels, height, width = shape
    x = torch.empty(shape, dtype=dtype, device="meta")
    taps = torch.empty(batch, channels, 3, height, width, dtype=dtype, device="meta")
    limits = Limits(SHARED_MEMORY[capability])
    if backward:
        return prepare_backward(x, x, x, taps, x, x, taps, x, direction, None, limits)[0]
    return prepare_forward(x, taps, x, x, direction, None, limits)


def propagate(
    capability: int, shape: tuple[int, int, int, int], dtype: torch.dtype, direction: str, states: int, groups: int,
    channels_last: bool, kind: str,
) -> Launch:  # fmt: skip
    """The forward, adjoint or gradients launch of a direction that is not the only one, with all that it may do."""
    batch, channels, height, width = shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    wide = torch.empty_like(x, dtype=torch.float32)
    rows = torch.empty(batch, states, height, width, dtype=dtype, device="meta")
    proxy = Proxy(rows)
    gate = torch.empty(1, channels, states, device="meta")
    weights = projections(torch.empty(1, groups, 3, states, device="meta"), gate, gate, gate[0], 1)[0]
    how = (weights, direction, None, Limits(SHARED_MEMORY[capability]))
    if kind == "forward":
        return prepare_scan(x, wide, x, proxy, *how, gated=True)
    if kind == "adjoint":
        return prepare_scan(x, None, wide, proxy, *how, adjoint=True)
    dproxy = prepare_gradients(x, x, wide, wide, wide, wide, rows, weights, None, direction, None)[1]
    return prepare_gradients(x, x, wide, wide, wide, wide, rows, weights, dproxy, direction, None)[0]


def build(launch: Launch, capability: int) -> Any:
    """Compile a launch, telling the compiler what the launch itself would: pointers are aligned, sizes are unknown."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {**launch.tensors, **launch.plan.integers, **launch.plan.constants}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is not None and name in launch.plan.integers:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[(i,)] = value
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.plan.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """The assembler's report about a compiled kernel, and counts of the instructions that move its data."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        done = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    assert numbers is not None, done.stdout
    registers, stack, local = map(int, numbers.groups())
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared_memory": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "copies": len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        "copies_of_16_bytes": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
        "copies_of_8_bytes": len(re.findall(r"cp\.async\.ca\.shared\.global[^;]*, 0x8", ptx)),
        "stores": len(re.findall(r"st\.global", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.v[24]", ptx)),
        "barriers": len(re.findall(r"bar\.sync", ptx)),
        "shuffles": len(re.findall(r"shfl\.sync", ptx)),
    }


def report(cases: list[tuple[Any, ...]], capability: int) -> None:
    """Print the resources of each case as JSON: ``(shape, dtype, direction, *rest)`` of one of the functions above."""
    results = []
    for shape, dtype, direction, *rest in cases:
        function = line_scan if len(rest) == 1 else propagate
        launch = function(capability, shape, getattr(torch, dtype), direction, *rest)
        results.append(resources(build(launch, capability)))
    json.dump(results, sys.stdout)


def one_compilation_for_all_sizes() -> None:
    """The launches of other sizes find the kernel that the first has had compiled."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """As much of a driver as compiling asks for."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    for backward in (False, True):
        kernels = set()
        for size in ((16, 8, 1024, 1024), (3, 7, 1000, 996), (1, 200, 1, 516), (1, 1, 33, 1020)):
            launch = line_scan(90, size, torch.float32, "down", backward)
            arguments = {**launch.tensors, **launch.plan.integers, **launch.plan.constants}
            kernels.add(
                launch.kernel.warmup(**arguments, num_warps=launch.plan.num_warps, enable_fp_fusion=True, grid=(1,))
            )
        assert len(kernels) == 1, kernels
