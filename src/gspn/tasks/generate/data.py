"""What a generative model learns from: pictures in [-1, 1], or an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..training.loaders import EvalLoader, TrainLoader, class_names, open_data, seeded_loader, share_loader
from .config import DataConfig, GenerateConfig


@dataclass
class GenerateData:
    """The data of a run.

    Attributes:
        name: As the data set calls itself.
        train: Batches of (input, label).
        held_out: Likewise, whose loss is measured; None without.
        classes: Names.
        channels: Of what the denoiser sees.
        sample_size: Its height and width.
        prepared: From a batch's input to what the denoiser learns; draws from PyTorch's generators for latents.
        vae: The autoencoder of latents; None for pictures.
    """

    name: str
    train: TrainLoader
    held_out: EvalLoader | None
    classes: list[str]
    channels: int
    sample_size: int
    prepared: Callable[[Tensor], Tensor]
    vae: Any = None


def open_data_of(config: GenerateConfig, *, processes: int, process: int, pin: bool) -> GenerateData:
    """Open the data that a configuration names.

    Raises:
        UsageError: it cannot be opened.
    """
    data = config.data
    places = {"processes": processes, "process": process, "pin": pin}
    train = open_data(data.name, data.train_split, data.root, **data.options)
    train.transform = picture_transform(data, training=True)
    held_out = None
    if data.eval_split is not None:
        pictures = open_data(data.name, data.eval_split, data.root, **data.options)
        pictures.transform = picture_transform(data, training=False)
        held_out = share_loader(pictures, batch_size=data.batch_size, workers=data.workers, **places)
    return GenerateData(
        name=data.name,
        train=seeded_loader(
            train,
            batch_size=data.batch_size,
            accumulate=config.optim.accumulate,
            seed=config.run.seed,
            workers=data.workers,
            **places,
        ),
        held_out=held_out,
        classes=class_names(train),
        channels=data.channels,
        sample_size=data.size,
        prepared=lambda pictures: pictures,
    )


def picture_transform(data: DataConfig, *, training: bool) -> Any:
    """From a PIL image to ``[channels, size, size]`` in [-1, 1]: the shorter side resized, the middle cut out."""
    require("torchvision")
    from torchvision import transforms

    steps: list[Any] = [
        transforms.Resize(data.size, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(data.size),
        transforms.Grayscale() if data.channels == 1 else transforms.Lambda(_coloured),
    ]
    if training and data.hflip:
        steps.append(transforms.RandomHorizontalFlip(data.hflip))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Lambda(_centred)])


def _coloured(image: Any) -> Any:
    return image.convert("RGB")


def _centred(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * 2 - 1
