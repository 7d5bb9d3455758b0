"""The Triton kernels, for CUDA devices and, under ``TRITON_INTERPRET=1``, for CPU tensors.

Nothing here imports triton before a call needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping

import torch

from ..backend import NotInstalled

DEVICES: tuple[str, ...] = ("cuda",)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_CAPABILITY = (8, 0)
"""The first compute capability that copies from memory to shared memory while it computes, and has bfloat16."""

_SHARED_MEMORY = 64 * 1024
"""Bytes of shared memory that every plan gets by with."""

_AMD: Mapping[str, tuple[str, ...]] = {"line_scan": ("gfx942", "gfx1100"), "propagate": ()}
"""The AMD GPUs that the kernels of each operator compile for: those that the tests compile them for."""


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
    if device.type == "cuda":
        return _why_not_card(torch.cuda.current_device() if device.index is None else device.index, op)
    return None


@functools.cache
def _why_not_card(index: int, op: str) -> str | None:
    """The reason why the kernels of ``op`` cannot run on a GPU, or None."""
    card = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = getattr(card, "gcnArchName", "").partition(":")[0] or "unknown"
        if arch in _AMD[op]:
            return None
        run = " and ".join(_AMD[op]) or "none"
        return f"of AMD GPUs the Triton kernels of {op} are compiled for {run}, and {card.name} is {arch}."
    if (card.major, card.minor) < _CAPABILITY:
        least = ".".join(map(str, _CAPABILITY))
        return (
            f"the Triton kernels need compute capability {least} (Ampere) or later, and {card.name} has "
            f"{card.major}.{card.minor}."
        )
    memory = getattr(card, "shared_memory_per_block_optin", None)
    if memory is not None and memory < _SHARED_MEMORY:
        return (
            f"the Triton kernels need {_SHARED_MEMORY // 1024} KB of shared memory, and {card.name} has "
            f"{memory / 1024:g} KB."
        )
    return None
