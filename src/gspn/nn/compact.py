"""``CompactGSPN2d``: propagation in a narrower space than that of the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .gspn2d import GSPN2d
from .options import check_options


class CompactGSPN2d(nn.Module):
    r"""Propagation in a latent space of few channels, as in C-GSPN (arXiv 2606.00746)::

        y = up( GSPN2d( down(x) ) )

    ``down`` and ``up`` are 1x1 convolutions without bias, from C channels to L and back. Proxy, taps, gates and scans
    have L channels, so their cost falls with L / C, and the result lies in the space that ``up`` spans.

    Args:
        dim: channels C of the map.
        latent_dim: channels L that are propagated.
        **propagation: options of :class:`GSPN2d`, such as ``proxy_dim``, ``groups`` and ``segment``.

    Shape:
        ``[B, C, H, W]`` to ``[B, C, H, W]``.

    Raises:
        TypeError: an option is unknown, or of another type.
        ValueError: an option does not fit, or a map does not have the shape above.

    Example:
        >>> import torch
        >>> from gspn.nn import CompactGSPN2d
        >>> layer = CompactGSPN2d(128, 16, proxy_dim=4)
        >>> layer(torch.randn(2, 128, 7, 5)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 128, 7, 5]), 5700)
    """

    def __init__(
        self, dim: int, latent_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        **propagation: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        check_options("count", dim=dim, latent_dim=latent_dim)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Conv2d(dim, latent_dim, 1, bias=False, **dd)
        self.gspn = GSPN2d(latent_dim, **propagation, **dd)
        self.up = nn.Conv2d(latent_dim, dim, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        x = self.gspn(self.down(x))  # [B, L, H, W]
        return self.up(x)  # [B, C, H, W]
