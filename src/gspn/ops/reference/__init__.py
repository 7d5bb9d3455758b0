"""The specification: every operator in plain PyTorch, for any device and any floating-point dtype.

Nothing here is fast. Each function says in the fewest possible words what its operator computes, and every other
backend is tested against it.
"""

from __future__ import annotations

import torch

from .line_scan import line_scan, line_scan_backward
from .propagate import propagate, propagate_backward

__all__ = ["DEVICES", "line_scan", "line_scan_backward", "propagate", "propagate_backward", "why_not"]

DEVICES: tuple[str, ...] = ()


def why_not(device: torch.device, dtype: torch.dtype, op: str) -> str | None:
    """None: it runs everywhere."""
    return None
