r"""A directory of latents, as ``gspn class-conditional latents`` writes it, opened as a data set.

It is a cache of shards (:mod:`.shard_cache`) with the tensors ``mean`` and ``std`` ``[n, V, C, h, w]``, and ``label``
and ``index`` ``[n]`` int64. The autoencoder is in ``vae/``, as diffusers saves it. V is 1, or 2 where the second is the
latent of the mirrored image. Means and deviations are those of the autoencoder's posterior, without any factor.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..._errors import UsageError
from ..._files import file_digest
from .autoencoder import load_autoencoder
from .digests import weights_digest
from .shard_cache import INDEX, CacheIndex, ShardReader

AUTOENCODER = "vae"
"""The folder of the autoencoder."""

REMEDY = "start `gspn class-conditional latents` again with the same arguments, which replaces what is damaged"
"""The remedy for missing or damaged files, as errors say it."""


@dataclass(frozen=True)
class VaeRecord:
    """The autoencoder."""

    source: str
    """Its directory or hub id, as the caller named it."""
    weights: str
    """:func:`~.digests.weights_digest`."""
    config: dict[str, Any]


@dataclass(frozen=True)
class ImagesRecord:
    """The images that were encoded."""

    name: str
    split: str
    options: dict[str, Any]
    names: str
    """A digest of their names and classes; in caches of version 0.1.0, of 16 letters, of some of the names."""
    classes: list[str]
    """Names; empty where labels are not classes."""
    size: int
    """Height and width."""


@dataclass(frozen=True, kw_only=True)
class LatentIndex(CacheIndex):
    """``index.json`` of latents."""

    NAME: ClassVar[str] = "latents"

    vae: VaeRecord
    data: ImagesRecord
    hflip: bool
    """Whether mirrored images were encoded too."""
    precision: str
    shape: tuple[int, int, int]
    """C, h and w of a latent."""

    @property
    def images(self) -> int:
        """Images that were encoded."""
        return sum(shard.rows for shard in self.shards)

    @property
    def views(self) -> int:
        """Latents of each image."""
        return 2 if self.hflip else 1

    @classmethod
    def converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of an index of format 1 under the keys of this one."""
        values = json.loads(json.dumps(values).replace('"pictures": ', '"rows": '))
        del values["complete"]
        return values | {"rows": values["data"].pop("images")}


class LatentSet(ShardReader[LatentIndex], Dataset):
    """Posteriors of images, with their classes, read from memory-mapped files.

    ``dataset[i]`` is ``(posterior, label)``: ``[2 C, h, w]`` float32, the mean and then the standard deviation, and an
    int. Where mirrored images were encoded, one replaces its image with probability ``hflip``, by Python's generator.
    ``hflip`` is 0 unless it is set. ``digest`` is that of the index, which holds the digests of all files.

    It can hold the same images encoded at other sizes (:meth:`add_sizes`), one of which is read at a time
    (:meth:`set_size`).
    """

    def __init__(self, directory: Path, index: LatentIndex, remedy: str = REMEDY) -> None:
        super().__init__(directory, index, remedy)
        self.name = index.data.name
        self.classes = list(index.data.classes)
        self.hflip = 0.0
        self.digest = file_digest(directory / INDEX)
        self.by_size: dict[int, LatentSet] = {index.data.size: self}
        self._read = self

    def add_sizes(self, *others: LatentSet) -> None:
        """Hold the same images at other sizes, too.

        Raises:
            UsageError: One is not of the same images, or of another autoencoder.
        """
        for one in others:
            for what, own in self._origin.items():
                if one._origin[what] != own:
                    raise UsageError(
                        f"{str(one.directory)!r} does not have the {what} of {str(self.directory)!r}; encode both "
                        "alike."
                    )
            self.by_size[one.index.data.size] = one

    @property
    def _origin(self) -> dict[str, Any]:
        """The facts that are the same at all sizes."""
        index, unread = self.index, [name for shard in self.index.shards for name in shard.broken]
        return {
            "autoencoder": index.vae.weights, "autoencoder's configuration": index.vae.config, "classes": self.classes,
            "images": index.data.names, "unread images": unread, "mirrored images": index.hflip,
        }  # fmt: skip

    def set_size(self, size: int) -> None:
        """Read the images at this size from here on."""
        self._read = self.by_size[size]

    @property
    def digests(self) -> dict[str, str]:
        """The digest, as ``latents``, and those of other sizes, as ``latents_SIZE``."""
        others = {f"latents_{size}": one.digest for size, one in self.by_size.items() if one is not self}
        return {"latents": self.digest, **others}

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        view = 1 if self.index.hflip and self.hflip and random.random() < self.hflip else 0  # noqa: S311
        return self._read._posterior(i, view)

    def _posterior(self, i: int, view: int) -> tuple[Tensor, int]:
        number, row = self.locate(i)
        shard = self.opened(number)
        parts = [shard.get_slice(part)[row, view] for part in ("mean", "std")]  # [C, h, w] each
        return self.finite(number, torch.cat(parts)).float(), int(shard.get_slice("label")[row])

    def filename(self, i: int, basename: bool = False, absolute: bool = False) -> str:
        """A name for latent i; the flags are timm's, and have no effect here."""
        del basename, absolute
        number, row = self.locate(i)
        return f"{self.index.shards[number].file}[{row}]"

    def autoencoder(self) -> Any:
        """The autoencoder that encoded the images, and decodes what is learnt from them.

        Raises:
            UsageError: Its copy is missing or damaged.
        """
        path = self.directory / AUTOENCODER
        vae = load_autoencoder(path)
        if weights_digest(vae) != self.index.vae.weights:
            raise UsageError(f"{str(path)!r} does not have the weights that encoded the images; {self._remedy}.")
        return vae


def open_latents(directory: str | Path, *, verify: bool = False, remedy: str = REMEDY) -> LatentSet:
    """Open a directory that ``gspn class-conditional latents`` wrote.

    The sizes and headers of all files are compared with the index, which takes milliseconds for each. ``verify`` reads
    all files and compares their checksums too, as training does. ``remedy`` is what errors about missing or damaged
    files end with.

    Raises:
        UsageError: There are none, they are not complete, or a file is missing or damaged.

    Example:
        >>> open_latents("data/imagenet256/train", verify=True)[0][0].shape  # doctest: +SKIP
        torch.Size([8, 32, 32])
    """
    path = Path(directory)
    index = LatentIndex.read(path)
    if index is None:
        raise UsageError(
            f"{str(directory)!r} has no {INDEX}; name a directory that `gspn class-conditional latents` wrote."
        )
    if not index.shards:
        raise UsageError(f"the latents in {str(directory)!r} are not complete; {remedy}.")
    latents = LatentSet(path, index, remedy)
    shape = (index.views, *index.shape)
    latents.check({"mean": shape, "std": shape, "label": ()}, checksums=verify)
    for number in range(len(index.shards)):
        labels = latents.opened(number).get_tensor("label")
        # Without classes a label is a row of the data set.
        if ((labels < 0) | ((labels >= len(latents.classes)) & bool(latents.classes))).any():
            raise latents.damaged(number)
    return latents


def at_size(directory: Path, size: int) -> Path:
    """The directory of the same images at another size, beside that of the first one.

    Example:
        >>> at_size(Path("latents/train"), 512).name
        'train-512'
    """
    return directory.parent / f"{directory.name}-{size}"


def sample_posterior(posterior: Tensor, *, shift: float, factor: float) -> Tensor:
    r"""Sample latents for a denoiser: :math:`(\mu + \sigma\,\epsilon - \text{shift}) \cdot \text{factor}`.

    Args:
        posterior: ``[B, 2 C, h, w]``, the mean and then the standard deviation.
        shift: The autoencoder's ``shift_factor``.
        factor: Its ``scaling_factor``, times that of the run. The pipeline divides by it and adds the shift.

    Returns:
        ``[B, C, h, w]``, float32. The noise comes from PyTorch's generator of the device.

    Example:
        >>> exact = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.zeros(1, 4, 2, 2)], dim=1)
        >>> sample_posterior(exact, shift=1.0, factor=0.5)[0, 0, 0, 0].item()
        1.0
    """
    mean, std = posterior.float().chunk(2, dim=1)  # [B, C, h, w] each
    return (mean + std * torch.randn_like(mean) - shift) * factor
