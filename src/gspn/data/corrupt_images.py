"""Corrupt images: an epoch does not end at one, and each is named and counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .._errors import UsageError
from .._files import printable
from .base import Wrapped
from .images import CorruptImageError

# The errors of a corrupt file: our own; of the operating system and most decoders of PIL; of PIL's PNG decoder; of a
# decompression bomb. A bug in a transform raises none of these and is not hidden.
_CORRUPT = (CorruptImageError, OSError, SyntaxError, Image.DecompressionBombError)
# So many files in a row that cannot be read are not an accident, but a folder that is not mounted or a disk that fails.
_MOST_IN_A_ROW = 100
_SHOWN = 5


class CorruptImageWarning(UserWarning):
    """Corrupt images were left out of an epoch."""


class SkipCorrupt(Wrapped):
    """A map-style data set around another one, in which corrupt images raise no error.

    ``dataset[i]`` is ``(image, target, corrupt)``. ``corrupt`` is -1 for a sound image. For a corrupt one it is ``i``,
    and the image and target are those of the next sound sample of the data set, counted cyclically:

    - in training with its target, so that the same sample always replaces the corrupt one;
    - in evaluation with target -1, so that the sample can be left out of every count.

    Make batches with ``collate`` and pass ``corrupt`` to ``CorruptImages.add``: so the indices come back from the
    workers of a ``DataLoader``.

    Raises:
        TypeError: the data set is a stream.
        UsageError: from ``__getitem__``: all images are corrupt, or the files of 100 in a row cannot be read.

    Example:
        >>> from gspn.data import Digits, SkipCorrupt
        >>> image, target, corrupt = SkipCorrupt(Digits("val"), training=False)[0]
        >>> corrupt
        -1
    """

    def __init__(self, dataset: Dataset, *, training: bool) -> None:
        super().__init__(dataset)
        self.training = training
        self._corrupt: set[int] = set()  # not decoded again: there may be thousands in a row
        self._first: str | None = None

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"{index=} is out of range for a data set of {length}.")
        index %= length
        unread: list[OSError] = []
        for step in range(length):
            position = (index + step) % length
            if position in self._corrupt:
                continue
            try:
                image, target = self.dataset[position]
            except OSError as error:
                unread.append(error)
                if len(unread) == _MOST_IN_A_ROW:
                    break
            except _CORRUPT as error:
                self._corrupt.add(position)
                self._first = self._first or str(error)
            else:
                return (image, target, -1) if step == 0 else (image, target if self.training else -1, index)
        first = str(unread[0]) if unread else self._first
        every = (
            f"all {length:,} images are corrupt"
            if len(unread) < _MOST_IN_A_ROW
            else (f"{_MOST_IN_A_ROW} images in a row cannot be read")
        )
        raise UsageError(f"{every}, from index {index} on; the first: {printable(first)}")

    def reason(self, index: int) -> str | None:
        """Open image ``index`` once more and return what is wrong with it; None if it opens now."""
        try:
            self.dataset[index]
        except _CORRUPT as error:
            return printable(error.reason if isinstance(error, CorruptImageError) else error)
        return None


class CorruptImages:
    """The record of a ``SkipCorrupt``'s corrupt images, in the main process.

    Each process of a distributed run records the samples that it has loaded.

    Args:
        dataset: the ``SkipCorrupt``, or a wrapper of it, which gives the names.

    Attributes:
        names: name of every corrupt image so far, by index.
        epoch: indices since the last ``end_epoch``.

    Example:
        >>> import torch
        >>> from gspn.data import CorruptImages, Digits, SkipCorrupt
        >>> record = CorruptImages(SkipCorrupt(Digits("val"), training=True))
        >>> record.add(torch.tensor([-1, 7, -1]))
        >>> record.count, record.names
        (1, {7: 'digits/1439'})
    """

    def __init__(self, dataset: Wrapped) -> None:
        self._dataset = dataset
        self.names: dict[int, str] = {}
        self.epoch: set[int] = set()

    @property
    def count(self) -> int:
        """The number of different corrupt images so far."""
        return len(self.names)

    def add(self, corrupt: Tensor | Iterable[int]) -> None:
        """Record the third part of a batch: ``[B]``, int64, indices or -1."""
        for index in corrupt.tolist() if isinstance(corrupt, Tensor) else corrupt:
            if index >= 0:
                self.epoch.add(index)
                if index not in self.names:
                    self.names[index] = self._dataset.filename(index)

    def summary(self) -> str | None:
        """Describe the epoch in one line, with the first five names; None if no image was corrupt."""
        if not self.epoch:
            return None
        shown = sorted(self.epoch)[:_SHOWN]
        skipping: Any = self._dataset
        while not isinstance(skipping, SkipCorrupt):
            skipping = skipping.dataset
        names = "; ".join(
            f"{printable(self.names[index])} ({skipping.reason(index) or 'it opens now'})" for index in shown
        )
        more = f"; and {len(self.epoch) - len(shown)} more" if len(self.epoch) > len(shown) else ""
        return f"{len(self.epoch)} of {len(self._dataset)} images were corrupt and left out: {names}{more}"

    def end_epoch(self) -> str | None:
        """Warn of the epoch's corrupt images with ``summary``, return that line, and begin a new epoch."""
        line = self.summary()
        self.epoch.clear()
        if line is not None:
            warnings.warn(line, CorruptImageWarning, stacklevel=2)
        return line


def collate(batch: Sequence[tuple[Any, ...]]) -> tuple[Any, Tensor, Tensor]:
    """Make a batch of ``(image, target, corrupt)``, or of ``(image, target)`` as a stream yields.

    Args:
        batch: samples, with images as tensors or arrays of one shape.

    Returns:
        Images ``[B, ...]``, targets ``[B]`` int64 and corrupt ``[B]`` int64, with -1 for sound images.

    Example:
        >>> import torch
        >>> from gspn.data import collate
        >>> images, targets, corrupt = collate([(torch.zeros(3, 2, 2), 4, -1), (torch.ones(3, 2, 2), -1, 17)])
        >>> images.shape, targets, corrupt
        (torch.Size([2, 3, 2, 2]), tensor([ 4, -1]), tensor([-1, 17]))
    """
    images = default_collate([sample[0] for sample in batch])
    return images, *_labels(batch)


def collate_padded(batch: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make a batch of images of several sizes, each at the top left of a map of zeros that holds the largest.

    Args:
        batch: samples as for :func:`collate`, with images as tensors ``[C, h, w]``.

    Returns:
        Images ``[B, C, H, W]``; sizes ``[B, 2]`` int64, the height and width of each image, which are the
        ``valid_size`` of :func:`gspn.propagate` and of the backbones; targets and corrupt as :func:`collate` has them.

    Raises:
        ValueError: the images differ in their channels or dtype.

    Example:
        >>> import torch
        >>> from gspn.data import collate_padded
        >>> images, sizes, targets, _ = collate_padded([(torch.ones(3, 2, 5), 4), (torch.ones(3, 6, 1), 0)])
        >>> images.shape, sizes.tolist(), targets
        (torch.Size([2, 3, 6, 5]), [[2, 5], [6, 1]], tensor([4, 0]))
    """
    images = [sample[0] for sample in batch]
    for image in images:
        if (image.shape[:-2], image.dtype) != (images[0].shape[:1], images[0].dtype):
            raise ValueError(
                f"images of shape {tuple(images[0].shape)} {images[0].dtype} and {tuple(image.shape)} {image.dtype} in "
                "one batch: they have to be [C, h, w] of the same channels and dtype."
            )
    sizes = torch.tensor([image.shape[-2:] for image in images])
    padded = images[0].new_zeros(len(images), images[0].shape[0], *sizes.amax(0).tolist())
    for whole, image in zip(padded, images, strict=True):
        whole[:, : image.shape[1], : image.shape[2]] = image
    return padded, sizes, *_labels(batch)


def _labels(batch: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
    """Targets and corrupt."""
    targets = torch.tensor([int(sample[1]) for sample in batch])
    corrupt = torch.tensor([int(sample[2]) if len(sample) > 2 else -1 for sample in batch])
    return targets, corrupt
