"""Images of several sizes in one batch: each lies at the top left of its map, and the rest of the map is padding.

``valid_size`` is int64 ``[B, 2]``: the height and the width of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .validation import check_memory

Sizes = Tensor | Sequence[Sequence[int]]
"""A ``valid_size`` as users pass it."""


def as_valid_size(valid_size: Any, x: Tensor) -> Tensor | None:
    """``valid_size``, a tensor anywhere or a list of pairs, as int64 ``[B, 2]`` on x's device; None for None.

    Sizes that are there to be read without waiting for a device are checked too.

    Raises:
        TypeError: they are not integers.
        ValueError: the shape does not fit, or a size is negative or beyond that of the map.
    """
    if valid_size is None:
        return None
    if not isinstance(valid_size, Tensor):
        try:
            valid_size = torch.tensor(valid_size) if len(valid_size) else torch.zeros(0, 2, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{valid_size=}: pass a height and a width for each image ({error}).") from error
    if valid_size.dtype.is_floating_point or valid_size.dtype.is_complex or valid_size.dtype == torch.bool:
        raise TypeError(f"{valid_size.dtype=}: heights and widths are integers, so convert with .long().")
    valid_size = valid_size.to(torch.int64)
    own = valid_size.to(x.device)
    if x.dim() >= 4:  # else the operator says what is wrong with x
        compiling = torch.compiler.is_compiling()
        check_valid_size(x, own, has_data=not compiling)
        if not compiling:
            _check_values(x, valid_size)
    return own


def check_valid_size(x: Tensor, valid_size: Tensor | None, has_data: bool = False) -> None:
    """Raise unless ``valid_size`` is None, or int64 ``[B, 2]`` beside ``x [B, .., H, W]``; with data, in its memory."""
    if valid_size is None:
        return
    if valid_size.dtype != torch.int64:
        raise TypeError(f"{valid_size.dtype=}: sizes are int64, so convert with .long().")
    if valid_size.layout is not torch.strided:
        raise TypeError(f"{valid_size.layout=}: sizes need strides, so convert with .to_dense().")
    if valid_size.shape != (x.shape[0], 2):
        raise ValueError(
            f"valid_size.shape={tuple(valid_size.shape)} does not fit x.shape={tuple(x.shape)}: it must be "
            f"[{x.shape[0]}, 2], the height and width of each image."
        )
    if valid_size.device != x.device:
        raise ValueError(f"{x.device=} but {valid_size.device=}; move both to one device.")
    if has_data and type(valid_size) is Tensor and not _is_wrapped(valid_size):
        check_memory("valid_size", valid_size)


def _is_wrapped(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def _check_values(x: Tensor, valid_size: Tensor) -> None:
    # Those on a GPU are not read, which would be to wait for it: the kernels take no pixel beyond the map.
    if type(valid_size) is not Tensor or valid_size.device.type != "cpu" or _is_wrapped(valid_size):
        return
    height, width = x.shape[-2:]
    for i, (rows, columns) in enumerate(valid_size.tolist()):
        if not (0 <= rows <= height and 0 <= columns <= width):
            raise ValueError(
                f"valid_size[{i}]={(rows, columns)} is not within the map of {height} x {width}; pass sizes from 0 to "
                "that of the map, and pad the map to the largest image."
            )


def valid_mask(valid_size: Tensor, x: Tensor) -> Tensor:
    """``[B, 1, H, W]``: True at the pixels of the images whose padded map is ``x [B, .., H, W]``."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device) < valid_size[:, :1]  # [B, H]
    columns = torch.arange(width, device=x.device) < valid_size[:, 1:]  # [B, W]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def within(x: Tensor, valid_size: Tensor | None) -> Tensor:
    """``x [B, .., H, W]`` with zeros in the padding, whatever stands there; ``x`` itself where there are no sizes.

    Example:
        >>> import torch
        >>> within(torch.ones(1, 1, 2, 3), torch.tensor([[1, 2]]))[0, 0]
        tensor([[1., 1., 0.],
                [0., 0., 0.]])
    """
    if valid_size is None:
        return x
    mask = valid_mask(valid_size, x)
    return torch.where(mask if x.dim() == 4 else mask.unsqueeze(1), x, 0)


def reduced(valid_size: Tensor | None, stride: int) -> Tensor | None:
    """The sizes of the images' maps after convolutions that reduce the resolution by ``stride``; None for None.

    Example:
        >>> reduced(torch.tensor([[1, 7], [0, 8]]), 4)
        tensor([[1, 2],
                [0, 2]])
    """
    return None if valid_size is None else (valid_size + (stride - 1)).div(stride, rounding_mode="floor")


def in_scan_order(valid_size: Tensor | None, line: int) -> Tensor | None:
    """``[B, 2]``, dense: the lines along axis ``line`` (-2 or -1) of each image, and their length."""
    return None if valid_size is None else (valid_size if line == -2 else valid_size.flip(1)).contiguous()


def empty_or_zeros(like: Tensor, valid_size: Tensor | None) -> Tensor:
    """A tensor for a kernel to write the images' pixels to: fresh, and zero where there is padding that it leaves."""
    return torch.empty_like(like) if valid_size is None else torch.zeros_like(like)
