"""The autoencoder of latents: diffusers' ``AutoencoderKL``, found, and told from others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UsageError, require


def load_autoencoder(source: str | Path) -> Any:
    """An ``AutoencoderKL`` from a directory or the hub.

    Args:
        source: A directory that ``save_pretrained`` wrote, of the autoencoder or of a pipeline with one, or a hub id.

    Returns:
        The autoencoder in float32 on the CPU, in evaluation mode, its weights fixed.

    Raises:
        UsageError: there is none, it is of another kind, or its weights are no safetensors or not whole.

    Example:
        >>> load_autoencoder("stabilityai/sd-vae-ft-ema").config.scaling_factor  # doctest: +SKIP
        0.18215
    """
    require("diffusers", "safetensors", extra="diffusers")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from safetensors import SafetensorError

    path = Path(source)
    if path.is_dir():
        folders = [folder for folder in (None, "vae") if (path / (folder or "") / "config.json").is_file()]
        if not folders:
            raise UsageError(f"vae {str(source)!r} has neither config.json nor vae/config.json; name an AutoencoderKL.")
        folders = folders[:1]
    elif str(source).startswith((".", "/", "~")):
        raise UsageError(f"vae {str(source)!r} is no directory; name one of an AutoencoderKL, or a hub id.")
    else:
        folders = [None, "vae"]
    problem = ""
    for folder in folders:
        where: dict[str, Any] = {} if folder is None else {"subfolder": folder}
        try:
            kind = dict(AutoencoderKL.load_config(str(source), **where)).get("_class_name")  # type: ignore[arg-type]
            if kind != "AutoencoderKL":
                problem = f"it is of {kind!r}, and latents are those of an AutoencoderKL"
                continue
            loaded: Any = AutoencoderKL.from_pretrained(
                str(source), use_safetensors=True, output_loading_info=True, **where
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            problem = problem or str(error)
            continue
        vae, report = loaded
        # diffusers draws missing weights at random, and says so in its log alone.
        if report["missing_keys"]:
            raise UsageError(f"vae {str(source)!r} has no weights for {', '.join(sorted(report['missing_keys'])[:3])}.")
        return vae.float().eval().requires_grad_(False)
    raise UsageError(f"vae {str(source)!r} cannot be loaded: {' '.join(problem.split())[:300]}")


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of a module's weights with their names, types and shapes, wherever they were loaded from.

    Example:
        >>> one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> weights_digest(one) == weights_digest(other)
        False
    """
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def config_of(vae: Any) -> dict[str, Any]:
    """The autoencoder's configuration, without where it came from and by which version."""
    # Through JSON, as what it is compared with was written: a tuple there is a list.
    return json.loads(json.dumps({key: value for key, value in vae.config.items() if not key.startswith("_")}))


def pixels_per_latent(vae: Any) -> int:
    """Pixels of an image for one of its latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
