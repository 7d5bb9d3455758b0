"""The Triton kernels, for CUDA devices and, under ``TRITON_INTERPRET=1``, for CPU tensors.

Nothing here imports triton before a call needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ..backend import NotInstalled

DEVICES: tuple[str, ...] = ("cuda",)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(device: torch.device, dtype: torch.dtype, op: str) -> str | None:
    """The reason why Triton cannot run ``op`` on this device and dtype, or None."""
    if not _installed():
        return NotInstalled("triton is not installed; pip install triton (Linux with an NVIDIA or AMD GPU).")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return (
            f"the Triton kernels need a CUDA device and the tensors are on {device.type}; move them with .to('cuda'), "
            "or set TRITON_INTERPRET=1 to debug the kernels on the CPU."
        )
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}."
    return None
