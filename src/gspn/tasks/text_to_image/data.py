"""The data of text-to-image training: the latents of images, and their encoded captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..._errors import UsageError, require
from ..core.loaders import EvalLoader, TrainLoader, open_data, seeded_loader, share_loader
from ..diffusion.latent_cache import cache_latents
from ..diffusion.latents import LatentSet, at_size, open_latents, sample_posterior
from .conditioning import Conditioning
from .config import DataConfig
from .decoding import shift_and_scale
from .text_cache import TextTable, cache_text

_REMEDY = "start the run again, which replaces what is damaged"


@dataclass
class EncodedSplit:
    """An encoded split."""

    latents: LatentSet
    """Posteriors of the images, with their indices in the data set."""
    text: TextTable
    """Captions by that index."""
    captions: list[str]
    """The first caption of each image."""


@dataclass
class EncodedData:
    """The data of a run, encoded."""

    name: str
    train: EncodedSplit
    held_out: EncodedSplit | None
    """The split whose loss is measured; None without."""
    shift: Tensor | float
    """Subtracted from the autoencoder's latents; the pipeline adds it before decoding."""
    scale: Tensor | float
    """Divisor of the shifted latents."""
    pixels: int
    """Pixels of an image for one of its latent, along a side."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, h and w of a latent."""
        return self.train.latents.index.shape

    def image_size(self, latents: Tensor) -> tuple[int, int]:
        """Height and width in pixels of images with these latents, ``[B, C, h, w]``."""
        height, width = latents.shape[-2:]
        return height * self.pixels, width * self.pixels

    def start(self, posterior: Tensor) -> Tensor:
        """Clean latents ``[B, C, h, w]``, sampled by PyTorch's generator from posteriors ``[B, 2 C, h, w]``."""
        shift, scale = (one.to(posterior) if isinstance(one, Tensor) else one for one in (self.shift, self.scale))
        return (sample_posterior(posterior, shift=0.0, factor=1.0) - shift) / scale

    def loaders(
        self, data: DataConfig, *, accumulate: int, seed: int, **process_info: Any
    ) -> tuple[TrainLoader, EvalLoader | None]:
        """Batches of (posterior, index in the data set)."""
        self.train.latents.hflip = data.hflip
        loading = {"batch_size": data.batch_size, "workers": data.workers, **process_info}
        sizes = data.images_by_size
        train = seeded_loader(self.train.latents, accumulate=accumulate, seed=seed, sizes=sizes, **loading)
        return train, None if self.held_out is None else share_loader(self.held_out.latents, **loading)


def encode_data(
    data: DataConfig, pipeline: Any, directory: Path, *, device: str = "auto", console: Console | None = None
) -> EncodedData:
    """Encode the data of a run with a pipeline's autoencoder and text encoders, unless its directory has them.

    The directory receives ``train/latents``, ``train/text``, ``eval/latents`` and ``eval/text``, and for each further
    one of ``data.sizes`` a ``train/latents-SIZE``.

    Raises:
        UsageError: The data cannot be opened or encoded, or the directory has other data.
    """
    require("accelerate", "timm", "torchvision", "safetensors")
    factor = pipeline.vae_scale_factor
    for size in data.sizes or ():  # before any of them is encoded
        if size % factor:
            raise UsageError(
                f"data.sizes has {size}, which is not a multiple of {factor}, the pixels of the autoencoder's latent; "
                f"use {max(round(size / factor), 1) * factor}."
            )
    splits = [
        _encode_split(data, split, pipeline, directory / name, device, console, sizes)
        for name, split, sizes in (("train", data.train_split, data.sizes), ("eval", data.eval_split, None))
        if split is not None
    ]
    shift, scale = shift_and_scale(pipeline, torch.zeros(()))
    return EncodedData(
        name=f"{data.name} {data.train_split}", train=splits[0], held_out=splits[1] if len(splits) > 1 else None,
        shift=shift, scale=scale, pixels=factor,
    )  # fmt: skip


def _encode_split(
    data: DataConfig, split: str, pipeline: Any, directory: Path, device: str, console: Console | None,
    sizes: Sequence[int] | None,
) -> EncodedSplit:  # fmt: skip
    images = open_data(data.name, split, data.root, kind="captioned", **data.options)

    def encoded(size: int, output: Path) -> LatentSet:
        cache_latents(
            pipeline.vae, data=data.name, split=split, images=images, output=output, size=size, hflip=data.hflip > 0,
            batch_size=data.encode_batch_size, device=device, workers=data.workers, console=console,
            option="data.cache", **data.options,
        )  # fmt: skip
        return open_latents(output, remedy=_REMEDY)

    path = directory / "latents"
    latents = encoded(data.size, path)
    latents.add_sizes(*(encoded(size, at_size(path, size)) for size in sizes or () if size != data.size))
    captions = [images.captions(i) for i in range(len(images))]
    text = cache_text(pipeline, captions, directory / "text", device=device, console=console)
    # Frees the memory of the device.
    pipeline.vae.to("cpu")
    return EncodedSplit(latents, text, [some[0] for some in captions])


@torch.no_grad()
def read_text(table: TextTable, rows: Tensor, device: torch.device) -> Conditioning:
    """Read encoded captions onto a device."""
    return table.read(rows).to(device, non_blocking=True)
