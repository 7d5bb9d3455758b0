"""The autoencoder of latents: diffusers' ``AutoencoderKL``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..._errors import UsageError, require
from ..._files import printable
from .pretrained import exists, load_model, reading


def load_autoencoder(source: str | Path) -> Any:
    """Load an ``AutoencoderKL``: in float32 on the CPU, in evaluation mode, its weights fixed.

    The source is a directory that ``save_pretrained`` wrote, or a hub id, of the autoencoder or a pipeline with one.

    Raises:
        UsageError: There is none, it is of another class, or its weights are incomplete or not in safetensors.

    Example:
        >>> load_autoencoder("stabilityai/sd-vae-ft-ema").config.scaling_factor  # doctest: +SKIP
        0.18215
    """
    require("diffusers", "safetensors", extra="diffusers")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    path, name = Path(source), printable(source)
    folders: list[str | None] = [None, "vae"]
    if exists(path):
        folders = [folder for folder in folders if (path / (folder or "") / "config.json").is_file()][:1]
        if not folders:
            raise UsageError(f"vae '{name}' has no config.json and no vae/config.json; name an AutoencoderKL.")
    elif str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise UsageError(f"vae '{name}' is not a directory; name one with an AutoencoderKL, or a hub id.")
    problem = None
    for folder in folders:
        where: dict[str, Any] = {} if folder is None else {"subfolder": folder}
        try:
            with reading(source):
                kind = AutoencoderKL.load_config(source, **where).get("_class_name")  # type: ignore[union-attr, arg-type]
            if kind != "AutoencoderKL":
                raise UsageError(f"its class is {printable(kind)[:80]}, and latents need an AutoencoderKL")
            return load_model(AutoencoderKL, source, **where).float().eval().requires_grad_(False)
        except UsageError as error:
            problem = problem or error
    raise UsageError(f"vae '{name}' cannot be loaded: {problem}")


def vae_scale_factor(block_out_channels: Sequence[int]) -> int:
    """Pixels of an image for each of its latent's, along a side: each block but the last halves it.

    Example:
        >>> vae_scale_factor((128, 256, 512, 512))
        8
    """
    return 2 ** (len(block_out_channels) - 1)
