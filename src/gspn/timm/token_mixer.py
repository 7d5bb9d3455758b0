"""``GSPNTokenMixer``: GSPN as a drop-in replacement for the self-attention of a vision transformer's block."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from gspn.nn import CompactGSPN2d, GSPN2d
from gspn.nn.options import check_options


class MapSize:
    """Height and width of a mounted model's map in tokens, which its blocks are not given.

    A hook on the patch embedding records them in every forward pass. Under gradient checkpointing a block runs again in
    the backward pass, perhaps after a forward pass at another size. Earlier sizes are therefore kept, one for each
    number of tokens. For a map as large and of another shape PyTorch's checkpointing itself raises.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self.earlier: dict[int, tuple[int, int]] = {}

    def record(self, patch_embed: Any, args: tuple[Any, ...], _output: Any) -> None:
        """The hook: record the size for an image ``[B, C, H, W]``."""
        height, width = patch_embed.dynamic_feat_size(tuple(args[0].shape[-2:]))
        self.size = height, width
        if not torch.compiler.is_compiling():  # a compiled graph holds its own recomputation
            self.earlier[height * width] = self.size

    def of(self, tokens: int) -> tuple[int, int]:
        """Height and width of the map of so many tokens.

        Raises:
            ValueError: no forward pass had a map of so many.
        """
        size = self.size
        if size is not None and size[0] * size[1] != tokens:
            size = self.earlier.get(tokens)
        if size is None:
            raise ValueError(
                f"{tokens} tokens are not a map of a known height and width: call the model with an image, because its "
                "patch embedding records them; a block alone lacks them."
            )
        return size


@register_notrace_module  # timm's feature extraction takes the whole module as one node
class GSPNTokenMixer(nn.Module):
    """Replaces the self-attention in a block of timm's ``VisionTransformer`` and ``Eva``::

        [p, m] = v(x)
        t_k = own_k * p_k + sum_n r_kn m_n        r_kn = sigmoid(read(m_n)_k) / sum_n sigmoid(read(m_n)_k)
        y   = scan(m) + sum_k write_k * p_k
        out = proj([t, y])

    where p are the values of the K prefix tokens, which are the class and register tokens, and m those of the patches,
    a map. ``scan`` is :class:`gspn.nn.GSPN2d`, or :class:`gspn.nn.CompactGSPN2d` with ``latent_dim``. Attention mixes
    all tokens with all. Here the patches mix by scans. A prefix token reads the map through a weighted mean, whose
    weights depend on each patch alone, and is written to every patch with a factor for each channel. Both cost K
    multiply-adds for each patch and channel, and there are none without prefix tokens. ``v`` and ``proj`` are linear
    layers of the attention's shapes, whose weights fit. There are no queries and keys, and rotary embeddings are not
    used: a scan knows where its pixels are.

    Args:
        dim: channels D of a token.
        prefix_tokens: number K of class and register tokens, which precede the patches.
        latent_dim: channels that are scanned, as in C-GSPN; None for all.
        proxy_dim: channels of the proxy; None for an eighth of those scanned.
        groups: sets of taps, a divisor of the channels scanned; None for a set for each channel.
        segment: lines after which the scans restart; None for global scans.
        reference_lines: lines at which lam is as it is, as for :class:`gspn.nn.GSPN2d`.
        skip: whether to add the input-dependent skip.
        proxy_bias: whether the proxy has a bias.
        bias: whether ``v`` has a bias.
        out_bias: whether ``proj`` has a bias.
        dropout: dropout of the result, in training.

    Shape:
        ``[B, K + H W, D]`` to ``[B, K + H W, D]``, the patches in row-major order.

    Raises:
        TypeError: ``segment`` or ``reference_lines`` is not an integer.
        ValueError: an option is out of range.

    Example:
        >>> import torch
        >>> from gspn.timm import GSPNTokenMixer
        >>> mixer = GSPNTokenMixer(32, prefix_tokens=1)
        >>> mixer(torch.randn(2, 1 + 6 * 9, 32), map_size=(6, 9)).shape
        torch.Size([2, 55, 32])
    """

    def __init__(
        self, dim: int, *, prefix_tokens: int = 0, latent_dim: int | None = None, proxy_dim: int | None = None,
        groups: int | None = None, segment: int | None = None, reference_lines: int | None = None, skip: bool = True,
        proxy_bias: bool = False, bias: bool = False, out_bias: bool = True, dropout: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_options("count", dim=dim)
        check_options("flag", bias=bias, out_bias=out_bias)
        check_options("fraction", dropout=dropout)
        if prefix_tokens:
            check_options("count", prefix_tokens=prefix_tokens)
        if latent_dim is not None:
            check_options("count", latent_dim=latent_dim)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.prefix_tokens = dim, prefix_tokens
        options: dict[str, Any] = {
            "proxy_dim": max((latent_dim or dim) // 8, 1) if proxy_dim is None else proxy_dim, "groups": groups,
            "segment": segment, "reference_lines": reference_lines, "skip": skip, "proxy_bias": proxy_bias,
        }  # fmt: skip
        self.v = nn.Linear(dim, dim, bias=bias, **dd)
        self.scan: nn.Module
        if latent_dim is None:
            self.scan = GSPN2d(dim, **options, **dd)
        else:
            self.scan = CompactGSPN2d(dim, latent_dim, **options, **dd)
        self.own = self.write = self.read = None
        if prefix_tokens:
            # At first the tokens read the map's mean and write nothing.
            self.own = nn.Parameter(torch.zeros(prefix_tokens, dim, **dd))
            self.write = nn.Parameter(torch.zeros(prefix_tokens, dim, **dd))
            self.read = nn.Linear(dim, prefix_tokens, **dd)
            nn.init.zeros_(self.read.weight)
            nn.init.zeros_(self.read.bias)
        self.proj = nn.Linear(dim, dim, bias=out_bias, **dd)
        self.proj_drop = nn.Dropout(dropout)
        self.map_size: MapSize | None = None  # of the model that it is mounted on

    @property
    def gspn(self) -> Any:
        """The :class:`gspn.nn.GSPN2d`, also that of the latent space."""
        return self.scan.gspn if isinstance(self.scan, CompactGSPN2d) else self.scan

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False,
        *, map_size: tuple[int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Mix the tokens of a map.

        Args:
            x: ``[B, K + H W, D]``.
            rope: ignored; rotary embeddings, for a model's other attentions.
            attn_mask: has to be None; a scan passes all pixels.
            is_causal: has to be False.
            map_size: H and W; None for those that the mounted model records.

        Returns:
            ``[B, K + H W, D]``.

        Raises:
            NotImplementedError: a mask is passed.
            ValueError: H and W are unknown, or K + H W is not the number of tokens.
        """
        del rope
        if attn_mask is not None or is_causal:
            shown = f"{is_causal=}" if attn_mask is None else f"attn_mask of {tuple(attn_mask.shape)}"
            raise NotImplementedError(f"{shown}: a scan cannot leave out tokens; call the model without a mask.")
        patches = x.shape[1] - self.prefix_tokens
        if map_size is None:
            if self.map_size is None:
                raise ValueError("map_size=None: pass the map's height and width, or mount the mixer on a model.")
            map_size = self.map_size.of(patches)
        elif map_size[0] * map_size[1] != patches:
            raise ValueError(f"{x.shape=} are not {self.prefix_tokens} tokens and those of a map of {map_size=}.")
        values = self.v(x)  # [B, K + N, D]
        return self.proj_drop(self.proj(self.mixed(values, map_size)))

    def mixed(self, values: Tensor, map_size: tuple[int, int]) -> Tensor:
        """The mixed values before ``proj``, ``[B, K + H W, D]`` as the values."""
        prefix, patches = values[:, : self.prefix_tokens], values[:, self.prefix_tokens :]  # [B, K, D], [B, N, D]
        pixels = patches.transpose(1, 2).unflatten(2, map_size)  # [B, D, H, W], channels last: no copy
        y = self.scan(pixels).flatten(2).transpose(1, 2)  # [B, N, D]
        if self.own is None or self.write is None or self.read is None:
            return y
        weights = self.read(patches).float().sigmoid()  # [B, N, K]
        weights = (weights / weights.sum(1, keepdim=True)).to(patches.dtype)
        tokens = self.own.to(prefix) * prefix + weights.transpose(1, 2) @ patches  # [B, K, D]
        y = y + (self.write.to(prefix) * prefix).sum(1, keepdim=True)
        return torch.cat((tokens.to(y.dtype), y), dim=1)

    def extra_repr(self) -> str:
        """The options shown in a printed model."""
        return f"{self.dim}, prefix_tokens={self.prefix_tokens}"
