"""One image over the processes of ``torchrun``: a UNet called on whole latents, of which each process computes rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gspn.diffusers import GSPNTokenMixer
from gspn.distributed import ImageRows

from ...._errors import UsageError
from .progressive_upscaling import Stage


class UNetByRows:
    """Calls a UNet as itself; each process computes some rows of the latents, and has the whole prediction.

    Latents have 4 channels where the UNet's maps have hundreds, so that each process keeps all of them: schedulers,
    noise and guidance are those of one process. See :class:`gspn.distributed.ImageRows`.

    Args:
        unet: A ``UNet2DConditionModel`` with an adapter mounted.

    Example:
        >>> UNetByRows(pipeline.unet)(latents, t, encoder_hidden_states=text)[0].shape  # doctest: +SKIP
        torch.Size([1, 4, 512, 512])
    """

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.config = unet.config

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's."""
        return self._unet.dtype

    def __call__(self, latents: Tensor, t: Any, **arguments: Any) -> tuple[Tensor]:
        """The prediction for latents ``[B, C, h, w]`` in a tuple, as with ``return_dict=False``."""
        rows = ImageRows(*latents.shape[2:], multiple=row_multiple(self._unet))
        with rows.applied(self._unet):
            own = self._unet(rows.take(latents), t, **{**arguments, "return_dict": False})[0]
        return (rows.gather(own),)


def row_multiple(unet: Any) -> int:
    """The rows of the latents that are one row of the UNet's smallest map."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


def check_rows(unet: Any, stages: Iterable[Stage], factor: int, processes: int, *, dilated: bool) -> None:
    """Check that a UNet's maps can be shared by so many processes; ``factor`` is the VAE's pixels per latent pixel.

    Raises:
        UsageError: There is no mixer, or a map with too few rows or channels.
    """
    mixers = [module for module in unet.modules() if isinstance(module, GSPNTokenMixer)]
    if not mixers:
        raise UsageError(
            "--shard-image: this UNet has its own self-attention, for which each process would need the tokens of the "
            "whole image; pass --adapter."
        )
    narrowest, multiple = min(mixer.dim for mixer in mixers), row_multiple(unet)
    if narrowest < processes:
        raise UsageError(
            f"--shard-image: a mixer has {narrowest} channels for {processes} processes; use at most {narrowest}."
        )
    for stage in stages:
        rows = stage.height // factor // (stage.dilation if dilated else 1)
        fewest = math.ceil(rows / multiple)
        if fewest < processes:
            raise UsageError(
                f"--shard-image: at {stage.width}x{stage.height} the UNet's smallest map has {fewest} rows for "
                f"{processes} processes; use at most {fewest} processes, or an image whose first stage is at least "
                f"{processes} x {multiple * factor} = {processes * multiple * factor} pixels high."
            )
