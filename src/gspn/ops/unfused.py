"""``propagate`` as a composition of ``stochastic_taps`` and ``line_scan``, with every map written to memory.

This defines the operator. It is differentiable to every order, and the fast kernels are timed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .directions import Direction
from .stochastic_taps import stochastic_taps
from .valid_size import within


def project(proxy: Tensor, weight: Tensor) -> Tensor:
    """A map for each row of ``weight``: ``[B, S, H, W]`` and ``[C, S]`` to ``[B, C, H, W]``."""
    if proxy.numel() == 0 or weight.numel() == 0:
        return torch.einsum("bshw,cs->bchw", proxy, weight)  # a convolution refuses maps without pixels or channels
    return F.conv2d(proxy, weight[:, :, None, None])


def project_taps(proxy: Tensor, weight: Tensor) -> Tensor:
    """Logits of taps: ``[B, S, H, W]`` and ``[G, 3, S]`` to ``[B, G, 3, H, W]``.

    The three taps are planes of G channels in memory, so that a scan over a channels_last map reads each tap of
    neighbouring channels side by side.
    """
    logits = project(proxy, weight.transpose(0, 1).flatten(0, 1))  # [B, 3G, H, W]
    return logits.unflatten(1, (3, weight.shape[0])).transpose(1, 2)


def compose(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    directions: Sequence[str], segment: int | None,
    scan: Callable[[Tensor, Tensor, Tensor, str, int | None], Tensor], valid_size: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""The sum over the directions of the scans, gated, and the skip.

    .. math::
        y = \mathrm{skip}\, p \odot x + \sum_d u_d\, p \odot
            \mathrm{line\_scan}_d\bigl(x,\; \mathrm{stochastic\_taps}(T_d\, p),\; \Lambda_d\, p\bigr)

    Args:
        x: ``[B, C, H, W]``.
        proxy: ``[B, S, H, W]``, of x's dtype.
        tap_proj: ``[D, G, 3, S]``; projections are converted to x's dtype.
        lam_proj: ``[D, C, S]``.
        u_proj: ``[D, C, S]``, times the merge.
        skip_proj: ``[C, S]``, the sum over the directions of skip times merge; None for none.
        directions: D of them.
        segment: as for :func:`gspn.line_scan`.
        scan: ``(x, taps, lam, direction, segment)`` to ``h``, a ``line_scan`` over images of these sizes.
        valid_size: ``[B, 2]``, the height and width of each image, or None.

    Returns:
        ``y``, of the shape and dtype of ``x``.
    """
    result, dtype = x.dtype, x.dtype
    if dtype.itemsize == 1:  # PyTorch stores 8-bit floats and does not compute with them
        dtype = torch.float32
        x, proxy = x.to(dtype), proxy.to(dtype)
    x, proxy = within(x, valid_size), within(proxy, valid_size)
    y = None if skip_proj is None else project(proxy, skip_proj.to(dtype)) * x  # [B, C, H, W]
    for d, direction in enumerate(cast("Sequence[Direction]", directions)):
        logits = project_taps(proxy, tap_proj[d].to(dtype))
        taps = stochastic_taps(logits, direction=direction, valid_size=valid_size)  # [B, G, 3, H, W]
        lam = project(proxy, lam_proj[d].to(dtype))  # [B, C, H, W]
        h = scan(x, taps, lam, direction, segment)  # [B, C, H, W]
        out = project(proxy, u_proj[d].to(dtype)) * h
        y = out if y is None else y + out
    return (torch.zeros_like(x) if y is None else y).to(result)
