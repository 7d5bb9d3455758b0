"""The autoencoder of latents: diffusers' ``AutoencoderKL``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..._errors import require

_INSIDE = ("", "vae", "last")  # a model, a pipeline, a run


def load_autoencoder(source: str | Path) -> Any:
    """Load an ``AutoencoderKL``: in float32 on the CPU, in evaluation mode, its weights fixed.

    The source is a directory that ``save_pretrained`` wrote, or a hub id, of the autoencoder or a pipeline with one.

    Raises:
        UsageError: There is none, it is of another class, or its weights are incomplete or not in safetensors.

    Example:
        >>> load_autoencoder("stabilityai/sd-vae-ft-ema").config.scaling_factor  # doctest: +SKIP
        0.18215
    """
    require("diffusers", "safetensors", "timm", extra="diffusers")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from .pretrained import CONFIG, downloaded, load_model, locate

    find = partial(
        locate, index=CONFIG, known={}, kind="AutoencoderKL", command="gspn autoencode train", inside=_INSIDE
    )
    folder = find(source)
    folder = find(downloaded(folder)) if isinstance(folder, str) else folder
    return load_model(AutoencoderKL, folder).float().eval().requires_grad_(False)


def vae_scale_factor(block_out_channels: Sequence[int]) -> int:
    """Pixels of an image for each of its latent's, along a side: each block but the last halves it.

    Example:
        >>> vae_scale_factor((128, 256, 512, 512))
        8
    """
    return 2 ** (len(block_out_channels) - 1)
