"""Where a measurement was taken: hardware, versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import gspn

_FALLBACK_CACHE = 64 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Environment:
    """Where a measurement was taken."""

    device: str
    """The model name of the GPU, or of the CPU."""
    threads: int
    isa: str | None
    """The instruction set that the compiled CPU kernels run with; None without them."""
    gspn: str
    torch: str
    triton: str | None
    python: str
    os: str
    commit: str | None
    """The commit of a checkout, with ``-dirty`` where files differ from it; None for an installed package."""


def describe(device: torch.device) -> Environment:
    """The environment of measurements on ``device``."""
    return Environment(
        device=device_name(device),
        threads=torch.get_num_threads(),
        isa=cpu_kernels_isa(),
        gspn=gspn.__version__,
        torch=torch.__version__,
        triton=package_version("triton"),
        python=platform.python_version(),
        os=f"{platform.system()} {platform.release().partition('-')[0]}",
        commit=git_commit(),
    )


def device_name(device: torch.device) -> str:
    """The model name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's model name as the operating system gives it."""
    if sys.platform == "linux":
        try:
            match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        except OSError:
            match = None
        if match:
            return match.group(1).strip()
    elif sys.platform == "darwin":
        name = _output_of("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine() or "unknown CPU"


def cpu_kernels_isa() -> str | None:
    """The instruction set that the compiled CPU kernels run with; None where there are none."""
    from gspn.ops.cpu import library

    try:
        return library.isa()
    except OSError:
        return None


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache in front of the device's memory, all instances together."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    instances: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared_by = (index / "shared_cpu_list").read_text().strip()
            number, unit = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip()).groups()  # type: ignore[union-attr]
        except (OSError, ValueError, AttributeError):
            continue
        instances[level, shared_by] = int(number) * _UNITS.get(unit, 1)
    if not instances:
        return _FALLBACK_CACHE
    last = max(level for level, _ in instances)
    return sum(size for (level, _), size in instances.items() if level == last)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device without swapping; None where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) << 10 if match else None


def git_commit() -> str | None:
    """The commit of the checkout this package is imported from, ``-dirty`` where files differ; None outside one."""
    folder, name = os.path.split(gspn.__file__)
    # A virtual environment may lie inside somebody else's checkout: ask whether this very file is tracked.
    if _output_of("git", "-C", folder, "ls-files", name) != name:
        return None
    return _output_of("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
