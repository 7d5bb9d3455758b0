"""Encoding a data set once, for all runs that learn its latents: :func:`cache_latents`."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..._files import replaced, replaced_directory, write_text
from ..class_conditional.config import DataConfig
from ..class_conditional.data import image_transform
from ..core.config import flat, from_mapping, to_mapping
from ..core.devices import make_accelerator
from ..core.errors import UsageError, require
from ..core.loaders import class_names, open_data
from ..core.loop import connected
from ..core.progress import progress_bar
from .autoencoder import config_of, load_autoencoder, pixels_per_latent, weights_digest
from .latents import (
    AUTOENCODER,
    FORMAT,
    INDEX,
    ImagesRecord,
    LatentIndex,
    Shard,
    VaeRecord,
    file_digest,
    fits,
    read_index,
)
from .shard_encoder import ShardEncoder

# Of so many images, evenly spread, the names are kept: enough to know another folder by, at no cost.
_NAMED = 64

# What a resumed call may have otherwise: where the same autoencoder lies, and what is only known at the end.
_FREE = ("vae.source", "complete", "images", "shards")


@dataclass(frozen=True)
class CachedLatents:
    """What :func:`cache_latents` wrote.

    Attributes:
        directory: Of the latents.
        index: What they are of.
        made: Shards that this call wrote in this process; others were there.
        broken: Names of images that could not be read and are left out.
        seconds: That it took.
        is_main: Whether this is the process that prints.
    """

    directory: Path
    index: LatentIndex
    made: int
    broken: tuple[str, ...]
    seconds: float
    is_main: bool = True


def cache_latents(
    vae: str | Path,
    *,
    data: str,
    output: str | Path,
    split: str = "train",
    root: str | Path | None = None,
    size: int = 256,
    hflip: bool = False,
    batch_size: int = 32,
    shard_size: int = 4096,
    precision: str = "fp32",
    device: str = "auto",
    workers: int = 4,
    console: Console | None = None,
    **options: Any,
) -> CachedLatents:
    r"""Encode every image of a data set once, and write the means and deviations of the autoencoder's posteriors.

    Training draws :math:`\mu + \sigma\,\epsilon` anew each time it sees an image, and applies the scaling. Numbers are
    float16: it rounds by 1/2048 at most, a twentieth of the least noise that a denoiser is shown, where bfloat16 would
    round by 1/256. A shard with a number beyond 65504 is float32.

    A shard is there whole or not at all. Killed at any time and called again, it goes on after the last whole shard and
    ends with the bytes of an uninterrupted run on the same device with the same batch size; shards whose checksum does
    not fit are made anew. Started by ``torchrun``, process i of N makes every N-th shard; another N may go on.

    Args:
        vae: What :func:`~.autoencoder.load_autoencoder` finds. A copy goes into the directory: training and the saved
            pipelines need no other.
        data: What :func:`gspn.data.open_dataset` opens.
        output: A directory, new, empty, or begun with the same arguments.
        split: Of the data set.
        root: Where it lies, if it does not come with the package.
        size: Height and width of the images: the shorter side resized, the middle cut out.
        hflip: Encode the mirrored images too, so that ``data.hflip`` can be used in training.
        batch_size: Images at a time.
        shard_size: Images in a file.
        precision: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` by autocast, which round more than the files do. GPUs take
            TF32 for fp32's convolutions where PyTorch is set so, which rounds as much as the files.
        device: ``"auto"`` takes a GPU if there is one, ``"cpu"`` none.
        workers: Processes that load images, for each process; 0 loads in it.
        console: Where to draw the bar; standard output by default.
        **options: Further arguments of :func:`gspn.data.open_dataset`.

    Returns:
        What was written. Images that cannot be read are left out, named and counted.

    Raises:
        UsageError: the autoencoder or the data cannot be opened or do not fit, the directory was begun with other
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
    autoencoder = load_autoencoder(vae)
    images = open_data(data, split, root, **options)
    class_names(images)  # a class-conditional model needs them
    return encode_data_set(
        autoencoder,
        images,
        output=output,
        source=str(vae),
        record=RecordKeys(data, split, options, size),
        hflip=hflip,
        batch_size=batch_size,
        shard_size=shard_size,
        precision=precision,
        device=device,
        workers=workers,
        console=console,
    )


@dataclass(frozen=True)
class RecordKeys:
    """What is written down of a data set besides what it says itself."""

    name: str
    split: str
    options: dict[str, Any]
    size: int


def encode_data_set(
    autoencoder: Any,
    images: Any,
    *,
    output: str | Path,
    source: str,
    record: RecordKeys,
    hflip: bool,
    batch_size: int,
    shard_size: int,
    precision: str,
    device: str,
    workers: int,
    console: Console | None,
    elsewhere: str = "--output",
) -> CachedLatents:
    """As :func:`cache_latents`, of a data set and with an autoencoder that are opened already.

    Args:
        autoencoder: What encodes.
        images: A data set of (image, label), whose transform is replaced; without ``classes`` any label counts.
        output: A directory, new, empty, or begun with the same arguments.
        source: What the autoencoder is called.
        record: What the data set is called, and the size of its images.
        hflip: Encode the mirrored images too.
        batch_size: Images at a time.
        shard_size: Images in a file.
        precision: As there.
        device: As there.
        workers: As there.
        console: As there.
        elsewhere: What another directory is named with, as errors say it.
    """
    asked = LatentIndex(
        format=FORMAT,
        complete=False,
        vae=VaeRecord(source, weights_digest(autoencoder), config_of(autoencoder)),
        data=_images_record(images, record),
        hflip=hflip,
        precision=precision,
        shard_size=shard_size,
        shape=_latent_shape(autoencoder, record.size),
    )
    images.transform = image_transform(
        DataConfig(size=record.size, channels=autoencoder.config.in_channels), training=False
    )
    work = _Caching(Path(output), asked, autoencoder, images, batch_size, workers, console or Console(), elsewhere)
    return connected(lambda: work.run(precision, device))


@dataclass
class _Caching:
    """One process's part of the work."""

    directory: Path
    index: LatentIndex
    vae: Any
    images: Any
    batch_size: int
    workers: int
    console: Console
    elsewhere: str

    def run(self, precision: str, device: str) -> CachedLatents:
        start = time.perf_counter()
        accelerator = make_accelerator(precision=precision, device=device)
        main = accelerator.is_main_process
        console = self.console if main else None
        self._compare_with_begun()
        accelerator.wait_for_everyone()  # all have looked before one writes
        if main:
            self._begin()
        accelerator.wait_for_everyone()
        shards = -(-self.index.data.images // self.index.shard_size)
        own = range(accelerator.process_index, shards, accelerator.num_processes)
        missing = self._missing(own, console)
        self.vae.to(accelerator.device)
        made = self._make(missing, accelerator, console)
        accelerator.wait_for_everyone()
        if main:
            self._complete(shards)
        accelerator.wait_for_everyone()
        index = read_index(self.directory) or self.index
        broken = tuple(name for shard in index.shards for name in shard.broken)
        return CachedLatents(self.directory, index, made, broken, time.perf_counter() - start, main)

    # --- What is there ------------------------------------------------------------------------------------------------

    def _compare_with_begun(self) -> None:
        """Go on with what the directory says, or refuse it."""
        directory = self.directory
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{str(directory)!r} is a file; name a directory.")
        begun = read_index(directory)
        if begun is None:
            # What a killed call left before its index was there.
            if directory.is_dir() and any(not path.name.startswith(".part-") for path in directory.iterdir()):
                raise UsageError(f"{str(directory)!r} holds other files and no {INDEX}; name a new directory.")
            return
        old, new = flat(to_mapping(begun)), flat(to_mapping(self.index))
        for key in sorted(old.keys() | new.keys()):
            if key not in _FREE and old.get(key) != new.get(key):
                raise UsageError(
                    f"{key} is {_shown(new.get(key))}, and the latents in {str(directory)!r} were begun with "
                    f"{_shown(old.get(key))}; give the same arguments again, or name another directory with "
                    f"{self.elsewhere}."
                )
        self.index = begun

    def _begin(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob(".part-*"):  # of a call that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if read_index(self.directory) is None:
            self._write_index(self.index)
        copy = self.directory / AUTOENCODER
        try:
            whole = copy.is_dir() and weights_digest(load_autoencoder(copy)) == self.index.vae.weights
        except UsageError:
            whole = False
        if not whole:
            with replaced_directory(copy) as part:
                self.vae.save_pretrained(part, safe_serialization=True)

    def _write_index(self, index: LatentIndex) -> None:
        write_text(self.directory / INDEX, json.dumps(to_mapping(index), indent=1) + "\n")

    def _missing(self, numbers: range, console: Console | None) -> list[int]:
        """The shards that are not there or whose checksum does not fit."""
        known = [(number, self._record(number)) for number in numbers]
        missing = {number for number, shard in known if shard is None}
        with progress_bar(console, "checking shards", len(known) - len(missing)) as advance:
            for number, shard in known:
                if shard is not None:
                    if not fits(self.directory, shard):
                        missing.add(number)
                    advance(1)
        return sorted(missing)

    def _record(self, number: int) -> Shard | None:
        """What is known of a shard: from the file beside it, which is newer, or from the index."""
        path = self._record_path(number)
        try:
            return from_mapping(Shard, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return self.index.shards[number] if number < len(self.index.shards) else None

    def _record_path(self, number: int) -> Path:
        return self.directory / f"latents-{number:05d}.json"

    def _complete(self, shards: int) -> None:
        """Put the records of all shards into the index."""
        found = [self._record(number) for number in range(shards)]
        listed = [shard for shard in found if shard is not None]
        total = sum(shard.images for shard in listed)
        if len(listed) < shards or total == 0:
            lost = f"{shards - len(listed)} of {shards} shards are not there" if total else "no image could be read"
            raise UsageError(f"{str(self.directory)!r}: {lost}; see to the data and start again.")
        self._write_index(replace(self.index, complete=True, images=total, shards=listed))
        for number in range(shards):
            self._record_path(number).unlink(missing_ok=True)

    # --- Making shards ------------------------------------------------------------------------------------------------

    def _make(self, numbers: list[int], accelerator: Any, console: Console | None) -> int:
        encoder = ShardEncoder(self.index, self.vae, self.images, accelerator, self.batch_size, self.workers)
        with progress_bar(console, "encoding", encoder.count(numbers)) as advance:
            for number, tensors, broken in encoder.shards(numbers, advance):
                self._write(number, tensors, broken)
        return len(numbers)

    def _write(self, number: int, tensors: dict[str, Tensor], broken: list[str]) -> None:
        """The file, then what is known of it: a kill between makes the file anew."""
        from safetensors.torch import save_file

        halves = {name: tensors[name].half() for name in ("mean", "std")}
        dtype = "float32"
        if all(bool(value.isfinite().all()) for value in halves.values()):
            tensors, dtype = {**tensors, **halves}, "float16"
        path = self.directory / f"latents-{number:05d}.safetensors"
        with replaced(path) as part:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part)
            size, digest = part.stat().st_size, file_digest(part)
        shard = Shard(path.name, len(tensors["label"]), dtype, size, digest, broken)
        write_text(self._record_path(number), json.dumps(to_mapping(shard), indent=1) + "\n")


def _images_record(images: Any, keys: RecordKeys) -> ImagesRecord:
    count = len(images)
    named = [str(images.filename(i * count // _NAMED)) for i in range(min(_NAMED, count))]
    return ImagesRecord(
        name=keys.name,
        split=keys.split,
        # As they come out of JSON again.
        options=json.loads(json.dumps(keys.options, default=str)),
        images=count,
        names=hashlib.sha256("\0".join(named).encode()).hexdigest()[:16],
        # A set whose targets are no classes says so by having none.
        classes=[] if getattr(images, "classes", None) == [] else class_names(images),
        size=keys.size,
    )


def _latent_shape(vae: Any, size: int) -> tuple[int, int, int]:
    factor, channels = pixels_per_latent(vae), vae.config.in_channels
    if channels not in (1, 3) or vae.config.out_channels != channels:
        raise UsageError(f"the autoencoder takes {channels} channels to {vae.config.out_channels}; images have 3 or 1.")
    if size % factor:
        raise UsageError(f"size {size} is no multiple of {factor}, the pixels of the autoencoder's latent.")
    return vae.config.latent_channels, size // factor, size // factor


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
