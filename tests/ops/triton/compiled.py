"""What test_aot.py runs in processes of their own, without the interpreter: kernels compiled for cards not here.

What is compiled is what would be launched: the launcher's own plan and arguments, for tensors on the meta device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gspn.ops.triton.line_scan import Launch, prepare_backward, prepare_forward
from gspn.ops.triton.planner import Limits

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, direction: str, backward: bool, capability: int
) -> Launch:
    """The launch for contiguous tensors with per-channel taps, a gate and, backward, every gradient."""
    batch, channels, height, width = shape
    x = torch.empty(shape, dtype=dtype, device="meta")
    taps = torch.empty(batch, channels, 3, height, width, dtype=dtype, device="meta")
    limits = Limits(SHARED_MEMORY[capability])
    if backward:
        return prepare_backward(x, x, x, taps, x, x, taps, x, direction, None, limits)[0]
    return prepare_forward(x, taps, x, x, direction, None, limits)


def build(what: Launch, capability: int) -> Any:
    """Compile a launch, telling the compiler what the launch itself would: pointers are aligned, sizes are unknown."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = what.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        if name in what.tensors:
            signature[name] = "*" + _TYPES[what.tensors[name].dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in what.integers:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[(i,)] = what.plan.constants[name]
    source = ASTSource(fn=what.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": what.plan.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, scratch: Path) -> dict[str, int]:
    """What the assembler reports about a compiled kernel, and which instructions move its data."""
    import triton

    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert numbers is not None, report
    registers, stack, local = map(int, numbers.groups())
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared_memory": compiled.metadata.shared,
        "copies": len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        "copies_of_16_bytes": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
        "copies_of_8_bytes": len(re.findall(r"cp\.async\.ca\.shared\.global[^;]*, 0x8", ptx)),
        "stores": len(re.findall(r"st\.global", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.v[24]", ptx)),
        "barriers": len(re.findall(r"bar\.sync", ptx)),
        "shuffles": len(re.findall(r"shfl\.sync", ptx)),
    }


def report(cases: list[tuple[str, str, bool]], capability: int, scratch: str) -> None:
    """Print the resources of each ``(dtype, direction, backward)`` at the benchmark's size, as JSON."""
    results = []
    for dtype, direction, backward in cases:
        what = launch((16, 8, 1024, 1024), getattr(torch, dtype), direction, backward, capability)
        results.append(resources(build(what, capability), Path(scratch)) | {"warps": what.plan.num_warps})
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
            what = launch(size, torch.float32, "down", backward, 90)
            arguments = what.tensors | what.integers | what.plan.constants
            kernels.add(
                what.kernel.warmup(**arguments, num_warps=what.plan.num_warps, enable_fp_fusion=True, grid=(1,))
            )
        assert len(kernels) == 1, kernels
