"""``SelfAttention2d``: self-attention over the pixels of a map, to compare GSPN with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.valid_size import Sizes, as_valid_size, valid_mask, within
from .options import check_options

# A trace does not know whether there are sizes.
for _name in ("as_valid_size", "within", "_keys"):
    torch.fx.wrap(_name)


class SelfAttention2d(nn.Module):
    r"""Softmax attention of every pixel to every pixel, without an output projection and without positions.

    It takes the place of :class:`~gspn.nn.GSPN2d` in the models that GSPN is compared with: it has the same input and
    output, and the block around it has the other projections.

    Args:
        dim: channels C of the map.
        head_dim: channels of a head. Where ``head_dim`` does not divide ``dim``, the nearest smaller divisor is taken.
        bias: whether the projection to queries, keys and values has a bias.

    Shape:
        ``[B, C, H, W]`` to ``[B, C, H, W]``.

    Example:
        >>> import torch
        >>> from gspn.nn import SelfAttention2d
        >>> SelfAttention2d(96)(torch.randn(2, 96, 7, 5)).shape
        torch.Size([2, 96, 7, 5])
    """

    def __init__(self, dim: int, *, head_dim: int = 64, bias: bool = True) -> None:
        super().__init__()
        check_options("count", dim=dim, head_dim=head_dim)
        self.dim = dim
        self.head_dim = next(size for size in range(min(head_dim, dim), 0, -1) if dim % size == 0)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=bias)

    def forward(self, x: Tensor, valid_size: Sizes | None = None) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``; ``valid_size`` as for :func:`gspn.propagate`."""
        valid_size = as_valid_size(valid_size, x)
        x = within(x, valid_size)
        batch, dim, height, width = x.shape
        heads = dim // self.head_dim
        qkv = self.qkv(x).flatten(2).view(batch, 3, heads, self.head_dim, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # [B, heads, N, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_keys(valid_size, x))
        return within(mixed.transpose(2, 3).reshape(batch, dim, height, width), valid_size)

    def extra_repr(self) -> str:
        """The sizes, for a printed model."""
        return f"{self.dim}, head_dim={self.head_dim}"


def _keys(valid_size: Tensor | None, x: Tensor) -> Tensor | None:
    """``[B, 1, 1, H W]``: the pixels to attend to, those of each image; None for all."""
    return None if valid_size is None else valid_mask(valid_size, x).flatten(2).unsqueeze(1)
