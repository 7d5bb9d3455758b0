"""What the public operators check and convert alike."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}.dtype is {tensor.dtype}; a scan needs floating point, so convert with .float().")


def check_segment(segment: int | None) -> None:
    """Raise TypeError or ValueError unless ``segment`` is None or a number of lines."""
    if segment is None:
        return
    if isinstance(segment, bool) or not isinstance(segment, (int, torch.SymInt)):
        raise TypeError(f"{segment=} is a {type(segment).__name__}; pass a number of lines, or None for a global scan.")
    if segment < 1:
        raise ValueError(f"{segment=} is below 1; pass a number of lines, or None for a global scan.")


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants a scan on ``like``'s device, None where it is off."""
    if not isinstance(like, Tensor):
        return None  # refused by the checks
    device = like.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    # The state grows with the number of lines and float16 ends at 65504: as for cumsum, float32 is what is safe.
    return torch.float32 if dtype == torch.float16 else dtype


def cast_eligible(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as autocast to ``dtype`` takes it: float64, and what is no floating-point tensor, stay."""
    eligible = isinstance(tensor, Tensor) and tensor.dtype.is_floating_point and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor
