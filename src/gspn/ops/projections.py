"""Maps that are linear in the proxy, computed pixel by pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(proxy: Tensor, weight: Tensor) -> Tensor:
    """A map for each row of ``weight``: ``[B, S, H, W]`` and ``[C, S]`` to ``[B, C, H, W]``."""
    if proxy.numel() == 0:
        return torch.einsum("bshw,cs->bchw", proxy, weight)  # a convolution refuses maps without pixels
    return F.conv2d(proxy, weight[:, :, None, None])


def project_taps(proxy: Tensor, weight: Tensor) -> Tensor:
    """Logits of taps: ``[B, S, H, W]`` and ``[G, 3, S]`` to ``[B, G, 3, H, W]``.

    The three taps are planes of G channels in memory, so that a scan over a channels_last map reads each tap of
    neighbouring channels side by side.
    """
    logits = project(proxy, weight.transpose(0, 1).flatten(0, 1))  # [B, 3G, H, W]
    return logits.unflatten(1, (3, weight.shape[0])).transpose(1, 2)
