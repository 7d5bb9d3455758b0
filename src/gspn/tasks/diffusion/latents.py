r"""A directory of latents: what ``gspn class-conditional latents`` writes, opened to be learnt.

====================================  ==================================================================================
``index.json``                        :class:`LatentIndex`: of what, by which autoencoder, and the shards
``latents-00000.safetensors``, ...    ``mean`` and ``std`` ``[n, V, C, h, w]``, ``label`` and ``index`` ``[n]`` int64
``vae/``                              the autoencoder, as diffusers saves it
====================================  ==================================================================================

V is 1, or 2 where the second is that of the mirrored image. Numbers are those of the autoencoder's posterior: no
factor is applied to them.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.config import from_mapping
from ..core.errors import UsageError, require
from .autoencoder import load_autoencoder, weights_digest

FORMAT = 1
"""Of the directory; another is refused."""

INDEX = "index.json"
AUTOENCODER = "vae"

AGAIN = "start `gspn class-conditional latents` again with the same arguments, which makes anew what does not fit"
"""The remedy for whatever is missing or damaged."""


@dataclass(frozen=True)
class VaeRecord:
    """The autoencoder."""

    source: str
    """As it was named."""
    weights: str
    """:func:`~.autoencoder.weights_digest`."""
    config: dict[str, Any]


@dataclass(frozen=True)
class ImagesRecord:
    """The images that were encoded."""

    name: str
    split: str
    options: dict[str, Any]
    images: int
    """Of the data set, broken ones included."""
    names: str
    """A digest of some of their names."""
    classes: list[str]
    """Names; none where labels are no classes."""
    size: int
    """Height and width."""


@dataclass(frozen=True)
class Shard:
    """A file of latents; the images of shard i are ``shard_size * i`` and on."""

    file: str
    images: int
    dtype: str
    """float16, or float32 where a number is beyond that."""
    bytes: int
    sha256: str
    broken: list[str]
    """Names of images that could not be read and are not in it."""


@dataclass(frozen=True)
class LatentIndex:
    """``index.json``."""

    format: int
    complete: bool
    """Whether all shards are there and listed."""
    vae: VaeRecord
    data: ImagesRecord
    hflip: bool
    """Whether mirrored images were encoded too."""
    precision: str
    shard_size: int
    shape: tuple[int, int, int]
    """C, h and w of a latent."""
    images: int = 0
    shards: list[Shard] = field(default_factory=list)

    @property
    def views(self) -> int:
        """Latents of an image."""
        return 2 if self.hflip else 1


class LatentSet(Dataset):
    """Posteriors of images, with their classes, read from memory-mapped files.

    ``dataset[i]`` is ``(posterior, label)``: ``[2 C, h, w]`` float32, the mean and then the standard deviation, and an
    int. Where mirrored images were encoded, one takes the place of its image with probability ``hflip``, drawn from
    Python's generator.

    Attributes:
        directory: Where they are.
        index: What they are of.
        classes: Names.
        hflip: See above; 0 unless set.
        digest: Of the index, which has those of all files.
    """

    def __init__(self, directory: Path, index: LatentIndex, digest: str, again: str = AGAIN) -> None:
        self.directory = directory
        self.index = index
        self.digest = digest
        self._again = again
        self.name = index.data.name
        self.classes = list(index.data.classes)
        self.hflip = 0.0
        self._ends = list(itertools.accumulate(shard.images for shard in index.shards))
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.index.images

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is out of range for {len(self)} latents.")
        number, row = self._place(i)
        view = 1 if self.index.hflip and self.hflip and random.random() < self.hflip else 0  # noqa: S311
        shard = self._shard(number)
        parts = [shard.get_slice(part)[row, view] for part in ("mean", "std")]  # [C, h, w] each
        return torch.cat(parts).float(), int(shard.get_slice("label")[row])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # an opened file does not pass to another process

    def filename(self, i: int, basename: bool = False, absolute: bool = False) -> str:
        """A name for latent i; the flags are timm's, and mean nothing here."""
        del basename, absolute
        number, row = self._place(i)
        return f"{self.index.shards[number].file}[{row}]"

    def autoencoder(self) -> Any:
        """The autoencoder that encoded and is to decode.

        Raises:
            UsageError: its copy is missing or damaged.
        """
        path = self.directory / AUTOENCODER
        vae = load_autoencoder(path)
        if weights_digest(vae) != self.index.vae.weights:
            raise UsageError(f"{str(path)!r} does not have the weights that encoded the images; {self._again}.")
        return vae

    def verify(self) -> None:
        """Read all files and compare their checksums.

        Raises:
            UsageError: one does not fit.
        """
        for shard in self.index.shards:
            if not fits(self.directory, shard):
                raise UsageError(f"{str(self.directory / shard.file)!r} does not have its checksum; {self._again}.")

    def check(self) -> None:
        """Compare the sizes and the headers of all files, without reading the latents.

        Raises:
            UsageError: a file is missing, cut short, or not what the index says.
        """
        from safetensors import SafetensorError

        index = self.index
        for number, shard in enumerate(index.shards):
            path = self.directory / shard.file
            shape = [shard.images, index.views, *index.shape]
            try:
                found = path.stat().st_size
                if found != shard.bytes:
                    raise UsageError(f"{str(path)!r} has {found:,} bytes and not {shard.bytes:,}; {self._again}.")
                opened = self._shard(number)
                shapes = [opened.get_slice(part).get_shape() for part in ("mean", "std", "label")]
                labels = opened.get_tensor("label")
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{str(path)!r} cannot be read ({error}); {self._again}.") from None
            # Without classes a label is another number: what image it is.
            outside = labels[(labels < 0) | ((labels >= len(self.classes)) & bool(self.classes))]
            if shapes != [shape, shape, shape[:1]] or len(outside):
                raise UsageError(f"{str(path)!r} is not what {INDEX} says; {self._again}.")

    def _place(self, i: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._ends, i)
        return number, i - (self._ends[number - 1] if number else 0)

    def _shard(self, number: int) -> Any:
        if number not in self._opened:
            path = self.directory / self.index.shards[number].file
            self._opened[number] = require("safetensors").safe_open(path, framework="pt")
        return self._opened[number]


def open_latents(directory: str | Path, *, verify: bool = False, again: str = AGAIN) -> LatentSet:
    """Open a directory that ``gspn class-conditional latents`` wrote.

    The sizes and headers of all files are compared with the index, which takes milliseconds each.

    Args:
        directory: Where they are.
        verify: Read all files and compare their checksums too.
        again: The remedy for what is missing or damaged, as errors say it.

    Raises:
        UsageError: there are none, they are not complete, or a file is missing or damaged.

    Example:
        >>> open_latents("data/imagenet256/train", verify=True)[0][0].shape  # doctest: +SKIP
        torch.Size([8, 32, 32])
    """
    path = Path(directory)
    index = read_index(path)
    if index is None:
        raise UsageError(
            f"{str(directory)!r} has no {INDEX}; name a directory that `gspn class-conditional latents` wrote."
        )
    if not index.complete:
        raise UsageError(f"the latents in {str(directory)!r} are not complete; {again}.")
    digest = hashlib.sha256((path / INDEX).read_bytes()).hexdigest()
    found = LatentSet(path, index, digest, again)
    found.check()
    if verify:
        found.verify()
    return found


def read_index(directory: Path) -> LatentIndex | None:
    """``index.json``, or None where there is none.

    Raises:
        UsageError: it is not one, or of another format.
    """
    path = directory / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as an index of latents: {error!r}.") from None
    if version != FORMAT:
        raise UsageError(
            f"{str(path)!r} is of format {version!r}, and this version of gspn reads {FORMAT}; make the latents anew."
        )
    try:
        return from_mapping(LatentIndex, values)
    except UsageError as error:
        raise UsageError(f"{str(path)!r}: {error}") from None


def fits(directory: Path, shard: Shard) -> bool:
    """Whether a shard's file is there with the size and the checksum of its record."""
    try:
        path = directory / shard.file
        return path.stat().st_size == shard.bytes and file_digest(path) == shard.sha256
    except OSError:
        return False


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled(posterior: Tensor, *, shift: float, factor: float) -> Tensor:
    r"""What a denoiser learns of a posterior: :math:`(\mu + \sigma\,\epsilon - \text{shift}) \cdot \text{factor}`.

    Args:
        posterior: ``[B, 2 C, h, w]``, the mean and then the standard deviation.
        shift: The autoencoder's ``shift_factor``.
        factor: Its ``scaling_factor``, times that of the run. The pipeline divides by it and adds the shift.

    Returns:
        ``[B, C, h, w]``, float32. The noise is drawn from PyTorch's generator of the device.

    Example:
        >>> exact = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.zeros(1, 4, 2, 2)], dim=1)
        >>> sampled(exact, shift=1.0, factor=0.5)[0, 0, 0, 0].item()
        1.0
    """
    mean, std = posterior.float().chunk(2, dim=1)  # [B, C, h, w] each
    return (mean + std * torch.randn_like(mean) - shift) * factor
