"""Latents for the tests: handwritten digits of 8 pixels, by a very small autoencoder with random weights."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from gspn.tasks.class_conditional import CachedLatents, ClassConditionalConfig, cache_latents
from gspn.tasks.diffusion import shard_cache as caching
from tasks.class_conditional.class_conditional_runs import tiny

_CONTEXT = multiprocessing.get_context("forkserver")

OPTIONS: dict[str, Any] = {
    "data": "digits",
    "size": 8,
    "batch_size": 100,
    "shard_size": 250,
    "workers": 0,
    "device": "cpu",
}


def autoencoder(**options: Any) -> AutoencoderKL:
    """Takes 8 pixels to 4; its shift and its factor are nobody's default."""
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4,
        "scaling_factor": 0.5, "shift_factor": 0.3, **options,
    }  # fmt: skip
    return AutoencoderKL(**settings).eval()


def cached(vae: Path, output: Path, **options: Any) -> CachedLatents:
    return cache_latents(vae, output=output, **{**OPTIONS, **options})


def latent_run(output: Path, latents: Path, *overrides: str) -> ClassConditionalConfig:
    """A tiny run on latents."""
    keys = ["data.size=32", "data.name=mnist5k", "data.channels=3", f"data.latents={latents}", *overrides]
    return tiny(output, *keys)


def files(directory: Path) -> dict[str, bytes]:
    """Everything in a directory."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def start_caching(vae: Path, output: Path, options: dict[str, Any], die_at: int) -> Any:
    """Cache in a process of its own, killed while it writes its file number ``die_at``."""
    process = _CONTEXT.Process(target=_cache, args=(vae, output, options, die_at))
    process.start()
    return process


def _cache(vae: Path, output: Path, options: dict[str, Any], die_at: int) -> None:
    torch.set_num_threads(1)
    plain, calls = caching.file_digest, []

    def file_digest(path: Path) -> str:
        # The file has its bytes and its name, and no record yet.
        calls.append(path)
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(path)

    caching.file_digest = file_digest
    cached(vae, output, **options)
