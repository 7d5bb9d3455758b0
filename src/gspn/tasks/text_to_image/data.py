"""What text to image learns from: the latents of images, and their captions as the text encoders see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..core.errors import MissingExtraError, UsageError, require
from ..core.loaders import EvalLoader, TrainLoader, seeded_loader, share_loader
from ..diffusion.latent_cache import RecordKeys, encode_data_set
from ..diffusion.latents import LatentSet, open_latents, sampled
from .conditioning import Conditioning
from .config import DataConfig
from .decoding import shift_and_scale
from .text_cache import TextTable, cache_text

AGAIN = "start the run again, which makes anew what does not fit"
"""The remedy for damaged latents."""


@dataclass
class EncodedSplit:
    """One split, encoded.

    Attributes:
        latents: Of (posterior, place in the data set).
        text: Captions by that place.
        captions: The first caption of each image, as written.
    """

    latents: LatentSet
    text: TextTable
    captions: list[str]


@dataclass
class EncodedData:
    """The data of a run, encoded.

    Attributes:
        name: As the data set calls itself.
        train: What is learnt.
        held_out: Whose loss is measured; None without.
        shift: What is taken from the autoencoder's latents, as the pipeline adds it before decoding.
        scale: What they are then divided by.
        pixels: Pixels of an image for one of its latent, along a side.
    """

    name: str
    train: EncodedSplit
    held_out: EncodedSplit | None
    shift: Tensor | float
    scale: Tensor | float
    pixels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, h and w of a latent."""
        return self.train.latents.index.shape

    def start(self, posterior: Tensor) -> Tensor:
        """What the UNet is to draw ``[B, C, h, w]``, from PyTorch's generator, of posteriors ``[B, 2 C, h, w]``."""
        shift, scale = (one.to(posterior) if isinstance(one, Tensor) else one for one in (self.shift, self.scale))
        return (sampled(posterior, shift=0.0, factor=1.0) - shift) / scale

    def loaders(
        self, data: DataConfig, *, accumulate: int, seed: int, **places: Any
    ) -> tuple[TrainLoader, EvalLoader | None]:
        """Batches of (posterior, place in the data set)."""
        self.train.latents.hflip = data.hflip
        train = seeded_loader(
            self.train.latents,
            batch_size=data.batch_size,
            accumulate=accumulate,
            seed=seed,
            workers=data.workers,
            **places,
        )
        if self.held_out is None:
            return train, None
        held_out = share_loader(self.held_out.latents, batch_size=data.batch_size, workers=data.workers, **places)
        return train, held_out


def encode_data(
    data: DataConfig, pipeline: Any, directory: Path, *, device: str = "auto", console: Console | None = None
) -> EncodedData:
    """Encode the data of a run, or find that it has been.

    Args:
        data: What, and in what size.
        pipeline: Whose autoencoder and text encoders.
        directory: Where it is kept: ``train/latents``, ``train/text``, and likewise ``eval``.
        device: ``"auto"`` takes a GPU if there is one, ``"cpu"`` none.
        console: Where to draw bars.

    Raises:
        UsageError: the data cannot be opened or encoded, or the directory has other data.
    """
    require("accelerate", "timm", "torchvision", "safetensors")
    splits = [
        _encode_split(data, split, pipeline, directory / name, device, console)
        for name, split in (("train", data.train_split), ("eval", data.eval_split))
        if split is not None
    ]
    shift, scale = shift_and_scale(pipeline, torch.zeros(()))
    return EncodedData(
        name=f"{data.name} {data.train_split}",
        train=splits[0],
        held_out=splits[1] if len(splits) > 1 else None,
        shift=shift,
        scale=scale,
        pixels=pipeline.vae_scale_factor,
    )


def _encode_split(
    data: DataConfig, split: str, pipeline: Any, directory: Path, device: str, console: Console | None
) -> EncodedSplit:
    images = open_captioned(data.name, split, data.root, **data.options)
    encode_data_set(
        pipeline.vae,
        images,
        output=directory / "latents",
        source="vae",
        record=RecordKeys(data.name, split, data.options, data.size),
        hflip=data.hflip > 0,
        batch_size=data.encode_batch_size,
        shard_size=4096,
        precision="fp32",
        device=device,
        workers=data.workers,
        console=console,
        elsewhere="data.cache",
    )
    captions = [images.captions(i) for i in range(len(images))]
    text = cache_text(pipeline, captions, directory / "text", device=device, console=console)
    # What encoded is not needed any more, and its memory is.
    pipeline.vae.to("cpu")
    return EncodedSplit(open_latents(directory / "latents", again=AGAIN), text, [some[0] for some in captions])


def open_captioned(name: str, split: str, root: Path | None = None, **options: Any) -> Any:
    """A :class:`gspn.data.CaptionedImages`.

    Raises:
        UsageError: there is none of that name, split or place.
        MissingExtraError: a package is not installed.
    """
    require("PIL", "timm")
    data = require("gspn.data")
    try:
        images = data.open_captions(name, split, root=root, **options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise UsageError(f"data {name!r}, split {split!r}: {' '.join(str(error).split())}") from None
    except ImportError as error:
        raise MissingExtraError(str(error)) from None
    if len(images) == 0:
        raise UsageError(f"data {name!r}, split {split!r} has no images.")
    return images


@torch.no_grad()
def read_text(table: TextTable, rows: Tensor, device: torch.device) -> Conditioning:
    """Encoded captions, on a device."""
    return table.read(rows).to(device, non_blocking=True)
