"""The CPU kernels: C++ behind a plain C interface, built with the package, loaded when a call first needs them."""

from __future__ import annotations

import sys

import torch

from ..backend import NotInstalled
from .library import instruction_set, instruction_sets, load

__all__ = ["DEVICES", "instruction_set", "instruction_sets", "why_not"]

DEVICES: tuple[str, ...] = ("cpu",)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype, op: str) -> str | None:
    """The reason why the CPU kernels cannot run ``op`` on this device and dtype, or None."""
    if device.type != "cpu":
        return f"the CPU kernels need CPU tensors and these are on {device.type}; move them with .cpu()."
    if dtype not in _DTYPES:
        return f"the CPU kernels take float32, float64, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}."
    try:
        load()
    except OSError as error:
        # pip would take the wheel without kernels again; and on Windows there is nothing else.
        install = "pip install --force-reinstall --no-deps --no-binary gspn gspn"
        compiled = f" Install a C++17 compiler (GCC or Clang), then {install}."
        return NotInstalled(f"{error}{'' if sys.platform == 'win32' else compiled}")
    return None
