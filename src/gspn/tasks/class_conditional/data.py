"""The data of a class-conditional model: images in [-1, 1], or an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._errors import UsageError
from ..core.loaders import EvalLoader, TrainLoader, class_names, open_splits
from ..core.task import Context
from ..diffusion.latents import LatentSet, at_size, open_latents, sample_posterior
from ..diffusion.transforms import image_transform
from .config import ClassConditionalConfig, DataConfig


@dataclass
class RunData:
    """The data of a run: batches of (input, label)."""

    name: str
    train: TrainLoader
    held_out: EvalLoader | None
    classes: list[str]
    channels: int
    sample_size: int
    """Height and width of the denoiser's input."""
    prepared: Callable[[Tensor], Tensor] = lambda images: images
    """From a batch's input to what the denoiser learns; samples latents by PyTorch's generators."""
    vae: Any = None
    """The autoencoder of latents; None for images."""
    digests: dict[str, str | None] = field(default_factory=lambda: {"latents": None})
    """Digests of the latents, of each size; None for images."""


def open_data_of(config: ClassConditionalConfig, context: Context) -> RunData:
    """Open the data of a configuration."""
    data, held_out, transforms = config.data, None, None
    if data.latents is not None:
        train, held_out, facts = _open_latents_of(config, data.latents)
    else:
        train, held_out = open_splits(data)
        train.transform = image_transform(data.size, data.channels, hflip=data.hflip)
        transforms = {size: image_transform(size, data.channels, hflip=data.hflip) for size in data.sizes or ()}
        if held_out is not None:
            held_out.transform = image_transform(data.size, data.channels)
        facts = {"name": data.name, "classes": class_names(train), "channels": data.channels, "sample_size": data.size}
    measured = None if held_out is None else context.eval_loader(held_out)
    return RunData(train=context.train_loader(train, transforms), held_out=measured, **facts)


def _open_latents_of(
    config: ClassConditionalConfig, directory: Path
) -> tuple[LatentSet, LatentSet | None, dict[str, Any]]:
    """The latents to train on, those that are held out, and the facts of a :class:`RunData`."""
    data = config.data
    train = open_latents(directory, verify=True)
    if not train.classes:
        raise UsageError(
            f"the latents in {str(directory)!r} have captions and no classes; name latents of images with classes."
        )
    _check_keys(data, train)
    train.hflip = data.hflip
    train.add_sizes(*(_open_size(directory, size) for size in data.sizes or () if size != data.size))
    held_out = None if data.eval_split is None else open_latents(data.eval_split, verify=True)
    if held_out is not None:
        _check_matching(held_out, train)
    vae = train.autoencoder()
    vae.enable_slicing()  # image by image: a batch that fits the denoiser may not fit the decoder
    channels, side, _ = train.index.shape
    shift, factor = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor * config.diffusion.scaling
    facts = {
        "name": f"{train.name} {train.index.data.split}", "classes": train.classes, "channels": channels,
        "sample_size": side, "prepared": partial(sample_posterior, shift=shift, factor=factor), "vae": vae,
        "digests": train.digests,
    }  # fmt: skip
    return train, held_out, facts


def _open_size(directory: Path, size: int) -> LatentSet:
    """The latents of the same images at another size."""
    path = at_size(directory, size)
    if not path.is_dir():
        raise UsageError(
            f"data.sizes has {size}, and there are no latents in {str(path)!r}; encode the images with `gspn "
            f"class-conditional latents --size {size} --output {path}`, or leave {size} out."
        )
    latents = open_latents(path, verify=True)
    if latents.index.data.size != size:
        raise UsageError(
            f"{str(path)!r} has latents of images of {latents.index.data.size} pixels; encode the images with "
            f"--size {size} in their place."
        )
    return latents


def _check_keys(data: DataConfig, latents: LatentSet) -> None:
    """Refuse a key that contradicts the latents; a key at its default does not."""
    index, default = latents.index, DataConfig()
    facts = {"name": index.data.name, "train_split": index.data.split, "size": index.data.size}
    for key, fact in facts.items():
        value = getattr(data, key)
        # With other sizes beside it, the size counts.
        passes = (fact,) if key == "size" and data.sizes else (fact, getattr(default, key))
        if value not in passes:
            raise UsageError(
                f"data.{key} is {value!r}, and the latents in {str(latents.directory)!r} are of {fact!r}; set "
                f"data.{key}={fact}, or name other latents."
            )
    if data.hflip and not index.hflip:
        raise UsageError(
            f"data.hflip is {data.hflip:g}, and {str(latents.directory)!r} has no mirrored images; make the latents "
            "with --hflip, or set data.hflip=0."
        )


def _check_matching(latents: LatentSet, train: LatentSet) -> None:
    """Refuse held-out latents that do not match those of the training."""
    for what, own, other in (
        ("autoencoder", latents.index.vae.weights, train.index.vae.weights),
        ("autoencoder's configuration", latents.index.vae.config, train.index.vae.config),
        ("shape", list(latents.index.shape), list(train.index.shape)),
        ("classes", latents.classes, train.classes),
    ):
        if own != other:
            raise UsageError(
                f"data.eval_split {str(latents.directory)!r} has another {what} than data.latents "
                f"{str(train.directory)!r}; encode both alike, or set data.eval_split=null."
            )
