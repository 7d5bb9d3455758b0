"""``GSPNTokenMixer``: what stands in the place of a block's self-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gspn.nn import GSPN2d


class GSPNTokenMixer(nn.Module):
    r"""Self-attention's place in a transformer block of diffusers, taken by the propagation.

    .. math::
        y = W_{out}\; \mathrm{GSPN2d}(W_v\, x)

    over the map that the tokens were flattened from. It is called as diffusers' ``Attention`` is, with the map's height
    and width besides, and has its names where they have a meaning: ``to_v`` and ``to_out.0`` are the same linear
    layers, so that weights and LoRAs of an attention fit. There are no queries and keys: taps and gates come from a
    proxy of the values. GSPN (arXiv 2501.12381) replaces the self-attention of text-to-image models so, with proxies of
    D / 8 channels.

    Args:
        dim: channels D of a token.
        proxy_dim: channels of the proxy; None for D / 8, as published.
        groups: sets of taps, a divisor of ``dim``; None for taps for each channel.
        segment: lines after which the scans restart; None for global scans.
        skip: whether to add the input-dependent skip.
        bias: of ``to_v``.
        out_bias: of ``to_out.0``.
        dropout: of the result, in training.

    Shape:
        ``[B, H W, D]`` to ``[B, H W, D]``, rows of the map one after the other.

    Raises:
        TypeError: ``segment`` is not an integer.
        ValueError: an option does not fit.

    Example:
        >>> import torch
        >>> from gspn.diffusers import GSPNTokenMixer
        >>> GSPNTokenMixer(32)(torch.randn(2, 6 * 9, 32), map_size=(6, 9)).shape
        torch.Size([2, 54, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        proxy_dim: int | None = None,
        groups: int | None = None,
        segment: int | None = None,
        skip: bool = True,
        proxy_bias: bool = False,
        bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        proxy_dim = max(dim // 8, 1) if proxy_dim is None else proxy_dim
        self.scan = GSPN2d(dim, proxy_dim=proxy_dim, groups=groups, segment=segment, skip=skip, proxy_bias=proxy_bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=out_bias), nn.Dropout(dropout)])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        map_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ARG002  (of processors of attention, which meet every attention of a model)
    ) -> Tensor:
        """Mix the tokens of a map.

        Args:
            hidden_states: ``[B, H W, D]``.
            encoder_hidden_states: None; there is nothing else to attend to.
            attention_mask: None; a scan passes all pixels.
            map_size: H and W.
            **kwargs: of no meaning here; what a model's other attentions are given, such as masks for IP-Adapters.

        Returns:
            ``[B, H W, D]``.

        Raises:
            NotImplementedError: there is a mask or something else to attend to.
            ValueError: H and W are missing, or H W is not the number of tokens.
        """
        if attention_mask is not None:
            raise NotImplementedError(
                f"{attention_mask.shape=}: a scan cannot leave out pixels; pass no attention_mask."
            )
        if encoder_hidden_states is not None:
            raise NotImplementedError(f"{encoder_hidden_states.shape=}: GSPN mixes a map with itself alone.")
        if map_size is None:
            raise ValueError(
                "map_size=None: the mixer does not know its map's height and width. A mounted model brings them where "
                "it is called as model(...); model.forward(...) leaves out the hooks that do."
            )
        height, width = map_size
        if hidden_states.shape[1] != height * width:
            raise ValueError(f"{hidden_states.shape=} are not the tokens of a map of {map_size=}.")
        v = self.to_v(hidden_states)  # [B, H W, D]
        v = v.transpose(1, 2).unflatten(2, (height, width))  # [B, D, H, W], channels last: no copy
        y = self.scan(v).flatten(2).transpose(1, 2)  # [B, H W, D]
        return self.to_out[1](self.to_out[0](y))

    def extra_repr(self) -> str:
        """What distinguishes this module in a printed network."""
        return f"{self.dim}"
