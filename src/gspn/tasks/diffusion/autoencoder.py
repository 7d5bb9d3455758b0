"""The autoencoder of latents: diffusers' ``AutoencoderKL``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..._errors import UsageError, require


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
    from safetensors import SafetensorError

    path = Path(source)
    folders, problem = [None, "vae"], ""
    if path.is_dir():
        folders = [folder for folder in folders if (path / (folder or "") / "config.json").is_file()][:1]
        if not folders:
            raise UsageError(f"vae {str(source)!r} has no config.json and no vae/config.json; name an AutoencoderKL.")
    elif str(source).startswith((".", "/", "~")):
        raise UsageError(f"vae {str(source)!r} is not a directory; name one with an AutoencoderKL, or a hub id.")
    for folder in folders:
        where: dict[str, Any] = {} if folder is None else {"subfolder": folder}
        try:
            kind = dict(AutoencoderKL.load_config(str(source), **where)).get("_class_name")  # type: ignore[arg-type]
            if kind != "AutoencoderKL":
                problem = f"its class is {kind!r}, and latents need an AutoencoderKL"
                continue
            options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, **where}
            loaded: Any = AutoencoderKL.from_pretrained(str(source), **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            problem = problem or str(error)
            continue
        vae, report = loaded
        # diffusers initialises missing weights at random, and only logs it.
        if report["missing_keys"]:
            raise UsageError(f"vae {str(source)!r} has no weights for {', '.join(sorted(report['missing_keys'])[:3])}.")
        return vae.float().eval().requires_grad_(False)
    raise UsageError(f"vae {str(source)!r} cannot be loaded: {' '.join(problem.split())[:300]}")


def vae_scale_factor(block_out_channels: Sequence[int]) -> int:
    """Pixels of an image for each of its latent's, along a side: each block but the last halves it.

    Example:
        >>> vae_scale_factor((128, 256, 512, 512))
        8
    """
    return 2 ** (len(block_out_channels) - 1)
