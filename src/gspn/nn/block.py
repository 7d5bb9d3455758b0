"""``GSPNBlock``: the token mixer and the MLP, each around a residual."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale2d
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from ..ops.valid_size import Sizes, as_valid_size, within
from .mixer import GSPNMixer

# A trace does not know whether there are sizes.
for _name in ("as_valid_size", "within"):
    torch.fx.wrap(_name)


class LocalPerceptionUnit(nn.Module):
    """``x + DWConv3x3(x)``, which GSPN-2 (arXiv 2512.07884) puts before each mixer and each MLP."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor, valid_size: Tensor | None = None) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``; ``valid_size`` as for :class:`GSPNMixer`."""
        x = within(x, valid_size)
        return x + self.conv_dw(x)


class GSPNBlock(nn.Module):
    """A block of a GSPN model: ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        mlp_ratio: hidden width of the MLP, as a multiple of ``dim``.
        lpu: whether a local perception unit, a residual depthwise 3x3 convolution, precedes the mixer and the MLP.
        layer_scale: initial value of a learned factor for each channel on both branches; None for no such factor.
        drop_path: probability with which a sample skips a branch in training.
        **mixer: options of :class:`GSPNMixer`.

    Shape:
        ``[B, dim, H, W]`` to ``[B, dim, H, W]``.

    Example:
        >>> import torch
        >>> from gspn.nn import GSPNBlock
        >>> GSPNBlock(16, proxy_dim=2, groups=1, lpu=True)(torch.randn(1, 16, 5, 8)).shape
        torch.Size([1, 16, 5, 8])
    """

    def __init__(
        self, dim: int, *, mlp_ratio: float = 4.0, lpu: bool = False, layer_scale: float | None = None,
        drop_path: float = 0.0, norm_eps: float = 1e-5, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, **mixer: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale2d(dim, init_values=layer_scale, **dd)

        self.lpu1 = LocalPerceptionUnit(dim, **dd) if lpu else nn.Identity()
        self.norm1 = LayerNorm2d(dim, eps=norm_eps, **dd)
        self.mixer = GSPNMixer(dim, norm_eps=norm_eps, **mixer, **dd)
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.lpu2 = LocalPerceptionUnit(dim, **dd) if lpu else nn.Identity()
        self.norm2 = LayerNorm2d(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), use_conv=True, **dd)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, valid_size: Sizes | None = None) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``; ``valid_size`` as for :class:`GSPNMixer`."""
        valid_size = as_valid_size(valid_size, x)
        x = x if isinstance(self.lpu1, nn.Identity) else self.lpu1(x, valid_size)
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x), valid_size)))
        x = x if isinstance(self.lpu2, nn.Identity) else self.lpu2(x, valid_size)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
