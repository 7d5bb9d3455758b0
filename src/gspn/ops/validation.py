"""The checks and conversions that the public operators share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a scan over ``dtype`` accumulates: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensors(x: Tensor, others: Mapping[str, Tensor], *also: torch.dtype) -> None:
    """Raise unless x and the others are floating-point tensors of x's dtype, or one ``also`` allowed, and x's device.

    Raises:
        TypeError: something is not a tensor or has another dtype.
        ValueError: something is on another device.
    """
    for name, tensor in {"x": x, **others}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}.dtype is {tensor.dtype}; a scan needs floating point, so convert with .float().")
        if tensor.dtype not in (x.dtype, *also):
            dtypes = " or ".join(str(dtype) for dtype in dict.fromkeys((x.dtype, *also)))
            raise TypeError(f"{x.dtype=} but {name}.dtype is {tensor.dtype}; convert it to {dtypes}.")
        if tensor.device != x.device:
            raise ValueError(f"{x.device=} but {name}.device is {tensor.device}; move all of them to one device.")


def check_image(x: Tensor, op: str) -> None:
    """Raise ValueError unless ``x`` is ``[B, C, H, W]``."""
    if x.dim() != 4:
        raise ValueError(f"{x.shape=}: x has {x.dim()} axes; {op} needs [B, C, H, W].")


def check_groups(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ValueError unless the second axis of ``tensor`` divides the channels of ``x``."""
    groups, channels = tensor.shape[1], x.shape[1]
    if groups == 0 or channels % groups != 0:
        raise ValueError(
            f"{name}.shape={tensor.shape} has {groups} groups, which do not divide the {channels} channels of "
            f"{x.shape=}; use 1 group (shared taps), {channels} (per-channel taps) or a divisor between."
        )


def check_segment(segment: int | None) -> None:
    """Raise TypeError or ValueError unless ``segment`` is None or a number of lines."""
    if segment is None:
        return
    if isinstance(segment, bool) or not isinstance(segment, (int, torch.SymInt)):
        raise TypeError(f"{segment=} is a {type(segment).__name__}; pass a number of lines, or None for a global scan.")
    if segment < 1:
        raise ValueError(f"{segment=} is below 1; pass a number of lines, or None for a global scan.")


def autocast(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors as autocast takes them on the first one's device.

    float64, and what is not a floating-point tensor, stay as they are; the checks refuse what is wrong. The state grows
    with the number of lines and float16 ends at 65504: under autocast to float16 a scan runs in float32, like cumsum.
    """
    like = tensors[0]
    if not isinstance(like, Tensor):
        return tensors  # type: ignore[return-value]
    device = like.device.type
    # Meta has no autocast, and the question is an error there. PyTorch 2.10 cannot trace is_autocast_available.
    if like.is_meta or not torch.is_autocast_enabled(device):
        return tensors  # type: ignore[return-value]
    dtype = torch.get_autocast_dtype(device)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype.is_floating_point and t.dtype != torch.float64 else t
        for t in tensors
    )  # type: ignore[return-value]
