"""``GSPNMixer``: the token mixer of a block."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from ..ops.valid_size import Sizes, as_valid_size, within
from .gspn2d import GSPN2d


def squares(x: Tensor) -> Tensor:
    """The sums of the squares of each channel's pixels, ``[B, C, 1, 1]``, in float32 or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum((2, 3), keepdim=True)


def _channel_norms(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        return x.norm(p=2, dim=(2, 3), keepdim=True)  # squares may overflow in half precision
    # The added number keeps the root's derivative finite where a channel is zero.
    return (squares(x) + torch.finfo(x.dtype).tiny).sqrt()


# The formula depends on the dtype, and what is done on whether there are sizes, neither of which a trace knows.
for _name in ("_channel_norms", "as_valid_size", "within"):
    torch.fx.wrap(_name)


class ResponseNorm(GlobalResponseNorm):
    """timm's GRN over ``[B, C, H, W]``, with the norm of each channel computed as the root of a sum of squares.

    ``Tensor.norm`` over two of four axes runs on one thread and takes 3 to 8 times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return self.scaled(x, _channel_norms(x))

    def scaled(self, x: Tensor, response: Tensor) -> Tensor:
        """``x`` by the norms of its channels, ``[B, C, 1, 1]``."""
        relative = response / (response.mean(dim=1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias.view(self.wb_shape), self.weight.view(self.wb_shape), x * relative)


class GSPNMixer(nn.Module):
    """The token mixer of GSPN (arXiv 2501.12381, figure 3), which takes the place of self-attention.

    1x1 projection to ``expand_ratio * dim`` channels, depthwise convolution, :class:`GSPN2d`, LayerNorm over the
    channels, global response normalization, and the 1x1 projection back. As in the authors' models, no layer has a bias
    and there is no activation: the nonlinearity comes from the products with the predicted gates.

    Args:
        dim: channels in and out.
        expand_ratio: width of the propagated map, as a multiple of ``dim``.
        kernel_size: size of the depthwise convolution, odd.
        **propagation: options of :class:`GSPN2d`, such as ``proxy_dim``, ``groups`` and ``segment``.

    Shape:
        ``[B, dim, H, W]`` to ``[B, dim, H, W]``.

    Example:
        >>> import torch
        >>> from gspn.nn import GSPNMixer
        >>> GSPNMixer(16, proxy_dim=4, groups=1)(torch.randn(1, 16, 9, 6)).shape
        torch.Size([1, 16, 9, 6])
    """

    def __init__(
        self, dim: int, *, expand_ratio: float = 1.5, kernel_size: int = 7, norm_eps: float = 1e-5,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **propagation: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"{kernel_size=} must be odd, so that the depthwise convolution keeps the map's size.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand_ratio * dim)
        self.in_proj = nn.Conv2d(dim, inner, 1, bias=False, **dd)
        self.conv_dw = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, bias=False, **dd)
        self.gspn = GSPN2d(inner, **propagation, **dd)
        self.norm = LayerNorm2d(inner, eps=norm_eps, **dd)
        self.grn = ResponseNorm(inner, channels_last=False, **dd)
        self.out_proj = nn.Conv2d(inner, dim, 1, bias=False, **dd)

    def forward(self, x: Tensor, valid_size: Sizes | None = None) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``.

        ``valid_size [B, 2]`` are the sizes of images that are smaller than the map, see :func:`gspn.propagate`. The
        result in the padding has no meaning.
        """
        valid_size = as_valid_size(valid_size, x)
        x = self.in_proj(within(x, valid_size))  # [B, C, H, W], zero where x is: there is no bias
        x = self.conv_dw(x)
        x = self.gspn(x) if valid_size is None else self.gspn(x, valid_size)
        x = self.grn(within(self.norm(x), valid_size))
        return self.out_proj(x)  # [B, dim, H, W]
