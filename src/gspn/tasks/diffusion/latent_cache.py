"""Encode a data set once, for all runs that learn its latents: :func:`cache_latents`."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..._console import default_console
from ..._errors import UsageError, require
from ..._files import printable, replaced_directory
from ..core.loaders import class_names, loaded, make_loader, open_data
from .autoencoder import load_autoencoder, vae_scale_factor
from .digests import digest, weights_digest
from .latents import AUTOENCODER, ImagesRecord, LatentIndex, VaeRecord
from .shard_cache import INDEX, CacheWriter
from .transforms import image_transform

# Version 0.1.0 told one folder from another by the names of so many images, evenly spread.
_NAMED, _SHORT = 64, 16
_SHOWN = 5


@dataclass(frozen=True)
class CachedLatents:
    """The result of :func:`cache_latents`."""

    directory: Path
    index: LatentIndex
    made: int
    """Shards that this process encoded in this call; the others were there."""
    broken: tuple[str, ...]
    """Names of images that could not be read and are left out."""
    seconds: float
    is_main: bool = True
    """Whether this is the process that prints."""


def cache_latents(
    vae: Any,
    *,
    data: str,
    output: str | Path,
    split: str = "train",
    root: str | Path | None = None,
    images: Any = None,
    size: int = 256,
    hflip: bool = False,
    batch_size: int = 32,
    shard_size: int = 4096,
    precision: str = "fp32",
    device: str = "auto",
    workers: int = 4,
    console: Console | None = None,
    option: str = "--output",
    **options: Any,
) -> CachedLatents:
    """Encode every image of a data set once, and write the means and deviations of the autoencoder's posteriors.

    Training samples ``mean + std * noise`` each time it sees an image, and applies the scaling. Numbers are
    float16, which rounds by 1/2048 at most: a twentieth of the least noise that a denoiser is shown (bfloat16 would
    round by 1/256). A shard with a number beyond 65504 is float32.

    The call can be killed at any time and repeated, and may be started by ``torchrun``: see
    :class:`~.shard_cache.CacheWriter`. The bytes are the same for the same device and batch size.

    Args:
        vae: A directory or hub id for :func:`~.autoencoder.load_autoencoder`, or an ``AutoencoderKL``. The output
            receives a copy, so that training and the saved pipelines need no other.
        data: Name of a data set for :func:`gspn.data.open_dataset`.
        output: A directory, new, empty, or begun with the same arguments.
        split: Of the data set.
        root: Directory of the data set, if it does not come with the package.
        images: The data set, if it is open already. Its transform is replaced. One whose labels are not classes has an
            empty ``classes``.
        size: Height and width of the images. The shorter side is resized to it, and the middle cut out.
        hflip: Encode the mirrored images too, so that ``data.hflip`` can be used in training.
        batch_size: Images at a time.
        shard_size: Images in a file.
        precision: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` by autocast, which round more than the files do. GPUs use
            TF32 for convolutions in fp32 where PyTorch is set so, which rounds as much as the files.
        device: ``"auto"`` uses a GPU if there is one, ``"cpu"`` does not.
        workers: Processes that load images, for each process; 0 loads in the process itself.
        console: Where to show progress; standard output by default.
        option: What names another output, as errors say it.
        **options: Further arguments of :func:`gspn.data.open_dataset`.

    Returns:
        What was written. Images that cannot be read are left out, named and counted.

    Raises:
        UsageError: The autoencoder or the data cannot be opened or do not fit, the directory was begun with other
            arguments or holds something else, or a latent is not finite.
        MissingExtraError: diffusers, accelerate or another package is not installed.

    Example:
        >>> from gspn.tasks.class_conditional import cache_latents
        >>> cache_latents("stabilityai/sd-vae-ft-ema", data="folder", root="imagenet", output="latents/train",
        ...               hflip=True)  # doctest: +SKIP
    """
    require("accelerate", "timm", "torchvision", "safetensors")
    if size < 1 or batch_size < 1 or shard_size < 1 or workers < 0:
        raise UsageError(
            f"size {size}, batch size {batch_size} and shard size {shard_size} have to be at least 1, workers "
            f"{workers} at least 0."
        )
    start, directory = time.perf_counter(), Path(output)
    autoencoder: Any = load_autoencoder(vae) if isinstance(vae, str | Path) else vae
    if images is None:
        images = open_data(data, split, root, **options)
        class_names(images)  # a class-conditional model needs them
    count = len(images)
    source = str(vae) if isinstance(vae, str | Path) else "vae"
    config = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
    begun = LatentIndex.read(directory)
    request = LatentIndex(
        rows=count,
        shard_size=shard_size,
        # Through JSON, as they are read again: a tuple becomes a list.
        vae=VaeRecord(source, weights_digest(autoencoder), json.loads(json.dumps(config))),
        data=ImagesRecord(
            name=data,
            split=split,
            options=json.loads(json.dumps(options, default=str)),
            names=_names_of(images, old=begun is not None and len(begun.data.names) == _SHORT),
            classes=[] if getattr(images, "classes", None) == [] else class_names(images),
            size=size,
        ),
        hflip=hflip,
        precision=precision,
        shape=_latent_shape(autoencoder, size),
    )
    images.transform = image_transform(size, autoencoder.config.in_channels)

    def save_autoencoder() -> None:
        copy = directory / AUTOENCODER
        try:
            whole = copy.is_dir() and weights_digest(load_autoencoder(copy)) == request.vae.weights
        except UsageError:
            whole = False
        if not whole:
            with replaced_directory(copy) as part:
                autoencoder.save_pretrained(part, safe_serialization=True)

    encoder = _Encoder(request, autoencoder, images, batch_size, workers)
    # The same autoencoder may be in another directory.
    writer = CacheWriter(directory, request, encoder.encode, "encoding", option, ("vae.source",), save_autoencoder)
    index, made, is_main = writer.write(precision=precision, device=device, console=console or default_console())
    broken = tuple(name for shard in index.shards for name in shard.broken)
    if broken and is_main:
        shown = "; ".join(map(printable, broken[:_SHOWN])) + ("; ..." if len(broken) > _SHOWN else "")
        warnings.warn(
            f"{len(broken):,} of {count:,} images of {data!r}, {split!r}, could not be read and are left out; "
            f"{printable(directory / INDEX)} names them: {shown}",
            require("gspn.data").CorruptImageWarning,
            stacklevel=2,
        )
    return CachedLatents(directory, index, made, broken, time.perf_counter() - start, is_main)


def _names_of(images: Any, *, old: bool) -> str:
    """A digest of the names and classes of all images; or that of some names which version 0.1.0 wrote."""
    if not old:
        return images.identity()
    count = len(images)
    named = [str(images.filename(i * count // _NAMED)) for i in range(min(_NAMED, count))]
    return digest(["\0".join(named).encode("utf-8", "surrogatepass")])[:_SHORT]


def _latent_shape(vae: Any, size: int) -> tuple[int, int, int]:
    factor, channels = vae_scale_factor(vae.config.block_out_channels), vae.config.in_channels
    if channels not in (1, 3) or vae.config.out_channels != channels:
        raise UsageError(
            f"the autoencoder maps {channels} channels to {vae.config.out_channels}; use one for "
            "images of 3 channels, or of 1."
        )
    if size % factor:
        raise UsageError(f"size {size} is not a multiple of {factor}, the pixels of the autoencoder's latent.")
    return vae.config.latent_channels, size // factor, size // factor


@dataclass
class _Encoder:
    """Encodes the images of shards."""

    index: LatentIndex
    vae: Any
    images: Any
    batch_size: int
    workers: int

    def encode(
        self, numbers: list[int], accelerator: Any, advance: Callable[[int], object]
    ) -> Iterator[tuple[int, dict[str, Tensor], list[str]]]:
        """For each shard its number, its tensors, and the names of images that could not be read."""
        self.vae.to(accelerator.device)
        # No batch reaches into another shard: the rounding of a shard must not depend on where a call began.
        shards = [self.index.rows_of(number) for number in numbers]
        batches = [[rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)] for rows in shards]
        order: Any = list(itertools.chain(*batches))
        safe = require("gspn.data").SkipCorrupt(self.images, training=False)
        batched = loaded(make_loader(safe, order, self.workers, accelerator.device.type == "cuda"))
        for number, parts in zip(numbers, batches, strict=True):
            encoded: list[dict[str, Tensor]] = []
            broken: list[str] = []
            for rows in parts:
                pixels, labels, unread = next(batched)
                broken += [self.images.filename(i) for i in unread.tolist() if i >= 0]
                mean, std = self._posteriors(pixels, accelerator)  # [B, V, C, h, w] each
                batch = {"mean": mean, "std": std, "label": labels, "index": torch.tensor(rows)}
                # An unread image is replaced by another one, which has a row of its own.
                encoded.append({name: value[unread < 0] for name, value in batch.items()})
                self._check(encoded[-1])
                advance(len(rows))
            yield number, {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}, broken

    @torch.inference_mode()
    def _posteriors(self, pixels: Tensor, accelerator: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[B, V, C, h, w]``, float32, of images ``[B, channels, size, size]``."""
        means, deviations = [], []
        for view in (pixels, pixels.flip(-1))[: self.index.views]:
            with accelerator.autocast():
                posterior = self.vae.encode(view.to(accelerator.device)).latent_dist
            means.append(posterior.mean.float().cpu())
            deviations.append((posterior.logvar.float() / 2).exp().cpu())
        return torch.stack(means, dim=1), torch.stack(deviations, dim=1)

    def _check(self, batch: dict[str, Tensor]) -> None:
        index, classes = self.index, len(self.index.data.classes)
        finite = (batch["mean"].isfinite() & batch["std"].isfinite()).flatten(1).all(1)
        classed = (batch["label"] >= 0) & ((batch["label"] < classes) | (classes == 0))
        for valid, problem in (
            (finite, f"a latent that is not finite in {index.precision}; use --precision fp32, or bf16"),
            (classed, f"a label that is not among the {classes} classes of the data; leave it out"),
        ):
            if not valid.all():
                name = self.images.filename(int(batch["index"][~valid][0]))
                raise UsageError(f"{printable(name)} of {index.data.name!r} has {problem}.")
        shape = tuple(batch["mean"].shape[2:])
        if shape != index.shape:
            raise UsageError(
                f"an image of {index.data.size} pixels has latents {list(shape)} and not {list(index.shape)}; use an "
                "autoencoder that halves a side with each of its blocks but the last."
            )
