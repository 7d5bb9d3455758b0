"""``GSPNTokenMixer``: GSPN as a drop-in replacement for the self-attention of a transformer block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gspn.nn import GSPN2d
from gspn.nn.options import check_options


class GSPNTokenMixer(nn.Module):
    """Replaces the self-attention in a transformer block of diffusers::

        y = to_out( GSPN2d( to_v(x) ) )

    on the feature map that the tokens were flattened from. The signature is that of diffusers' ``Attention``, plus the
    map's height and width. ``to_v`` and ``to_out.0`` are the same linear layers under the same names, so that an
    attention's weights and LoRAs fit. There are no queries and keys: taps and gates are projected from a proxy of the
    values. This is how GSPN (arXiv 2501.12381) replaces the self-attention of text-to-image models, with proxies of
    D / 8 channels.

    Args:
        dim: Channels D of a token.
        proxy_dim: Channels of the proxy; None for D / 8, as published.
        groups: Sets of taps, a divisor of ``dim``; None for a set for each channel.
        segment: Lines after which the scans restart; None for global scans.
        reference_lines: Lines at which lam is as it is, as for :class:`gspn.nn.GSPN2d`; None for the paper's operator.
        skip: Whether to add the input-dependent skip.
        proxy_bias: Whether the proxy has a bias.
        bias: Whether ``to_v`` has a bias.
        out_bias: Whether ``to_out.0`` has a bias.
        dropout: Dropout of the result, in training.

    Shape:
        ``[B, H W, D]`` to ``[B, H W, D]``, the tokens in row-major order.

    Raises:
        TypeError: ``segment`` or ``reference_lines`` is not an integer.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> from gspn.diffusers import GSPNTokenMixer
        >>> GSPNTokenMixer(32)(torch.randn(2, 6 * 9, 32), map_size=(6, 9)).shape
        torch.Size([2, 54, 32])
    """

    def __init__(
        self, dim: int, *, proxy_dim: int | None = None, groups: int | None = None, segment: int | None = None,
        reference_lines: int | None = None, skip: bool = True, proxy_bias: bool = False, bias: bool = False,
        out_bias: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_options("count", dim=dim)
        check_options("flag", bias=bias, out_bias=out_bias)
        check_options("fraction", dropout=dropout)
        self.dim = dim
        proxy_dim = max(dim // 8, 1) if proxy_dim is None else proxy_dim
        self.scan = GSPN2d(
            dim, proxy_dim=proxy_dim, groups=groups, segment=segment, reference_lines=reference_lines, skip=skip,
            proxy_bias=proxy_bias,
        )  # fmt: skip
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=out_bias), nn.Dropout(dropout)])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        map_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ARG002  (for attention processors: a model passes them to all its attentions)
    ) -> Tensor:
        """Mix the tokens of a map.

        Args:
            hidden_states: ``[B, H W, D]``.
            encoder_hidden_states: Has to be None; a mixer does not do cross-attention.
            attention_mask: Has to be None; a scan passes all pixels.
            map_size: H and W.
            **kwargs: Ignored; arguments for a model's other attentions, such as masks for IP-Adapters.

        Returns:
            ``[B, H W, D]``.

        Raises:
            NotImplementedError: A mask or ``encoder_hidden_states`` is passed.
            ValueError: H and W are missing, or H W is not the number of tokens.
        """
        if attention_mask is not None:
            raise NotImplementedError(
                f"{attention_mask.shape=}: a scan cannot leave out pixels; pass no attention_mask."
            )
        if encoder_hidden_states is not None:
            raise NotImplementedError(f"{encoder_hidden_states.shape=}: GSPN replaces self-attention only.")
        if map_size is None:
            raise ValueError(
                "map_size=None: the mixer needs its map's height and width. Hooks of a mounted model pass them: call "
                "model(...), because model.forward(...) skips hooks."
            )
        height, width = map_size
        if hidden_states.shape[1] != height * width:
            raise ValueError(f"{hidden_states.shape=} are not the tokens of a map of {map_size=}.")
        v = self.to_v(hidden_states)  # [B, H W, D]
        v = v.transpose(1, 2).unflatten(2, (height, width))  # [B, D, H, W], channels last: no copy
        y = self.scan(v).flatten(2).transpose(1, 2)  # [B, H W, D]
        return self.to_out[1](self.to_out[0](y))

    def extra_repr(self) -> str:
        """The options shown in a printed model."""
        return f"{self.dim}"
