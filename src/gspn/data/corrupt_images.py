"""Broken images: no epoch ends at one, and each is named and counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from gspn.data.base import Wrapped
from gspn.data.images import BrokenImageError

# What a data set raises where a file is at fault: our own error; the operating system and most decoders of PIL; PIL's
# PNG decoder; a bomb. A bug in a transform raises none of these, and is not hidden.
_BROKEN = (BrokenImageError, OSError, SyntaxError, Image.DecompressionBombError)
# So many in a row are no accident: a folder that is not mounted, a disk that fails.
_MOST_IN_A_ROW = 100
_SHOWN = 5


class BrokenImageWarning(UserWarning):
    """Images were left out of an epoch."""


class SkipBroken(Wrapped):
    """A map-style data set in which a broken image takes nothing down.

    ``dataset[i]`` is ``(image, target, broken)``. ``broken`` is -1 for a sound image. Where image ``i`` is broken it is
    ``i``, and the other two are

    - in training the next sound sample of the data set, round its end: always the same one;
    - in evaluation the same image with target -1, by which the sample is to be left out of every count.

    Make batches of them with ``collate`` and hand ``broken`` to ``BrokenImages.add``: that is how the indices come back
    from the workers of a ``DataLoader``.

    Args:
        dataset: map-style, of ``(image, target)``.
        training: whether a sample in place of a broken one may take part.

    Raises:
        TypeError: the data set is a stream.
        RuntimeError: from ``__getitem__``: 100 images in a row, or all, are broken.

    Example:
        >>> from gspn.data import Digits, SkipBroken
        >>> image, target, broken = SkipBroken(Digits("val"), training=False)[0]
        >>> broken
        -1
    """

    def __init__(self, dataset: Dataset, *, training: bool) -> None:
        super().__init__(dataset)
        self.training = training

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"{index=} is out of range for a data set of {length}.")
        index %= length
        first: Exception | None = None
        for step in range(min(length, _MOST_IN_A_ROW)):
            try:
                image, target = self.dataset[(index + step) % length]
            except _BROKEN as error:
                first = first or error
                continue
            if step == 0:
                return image, target, -1
            return image, target if self.training else -1, index
        raise RuntimeError(
            f"{min(length, _MOST_IN_A_ROW)} images in a row are broken, from index {index}; the first: {first}"
        ) from first

    def reason(self, index: int) -> str | None:
        """What is wrong with image ``index``, by opening it once more; None if it opens now."""
        try:
            self.dataset[index]
        except _BROKEN as error:
            return error.reason if isinstance(error, BrokenImageError) else str(error)
        return None


class BrokenImages:
    """The broken images of a ``SkipBroken``, collected in the main process.

    Each process of a distributed run keeps its own record, of the samples that it has drawn.

    Args:
        dataset: gives the names: the ``SkipBroken``, or a wrapper of it.

    Attributes:
        names: of every broken image so far, by index.
        epoch: indices since the last ``end_epoch``.

    Example:
        >>> import torch
        >>> from gspn.data import BrokenImages, Digits, SkipBroken
        >>> record = BrokenImages(SkipBroken(Digits("val"), training=True))
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
        """How many different images have been broken so far."""
        return len(self.names)

    def add(self, broken: Tensor | Iterable[int]) -> None:
        """Take note of the third part of a batch: ``[B]``, int64, an index or -1."""
        for index in broken.tolist() if isinstance(broken, Tensor) else broken:
            if index >= 0:
                self.epoch.add(index)
                if index not in self.names:
                    self.names[index] = self._dataset.filename(index)

    def summary(self) -> str | None:
        """One line on the epoch, with the first five names; None if all images were sound."""
        if not self.epoch:
            return None
        shown = sorted(self.epoch)[:_SHOWN]
        named = "; ".join(f"{self.names[index]} ({self._reason(index)})" for index in shown)
        more = f"; and {len(self.epoch) - len(shown)} more" if len(self.epoch) > len(shown) else ""
        return f"{len(self.epoch)} of {len(self._dataset)} images were broken and left out: {named}{more}"

    def end_epoch(self) -> str | None:
        """Warn of the epoch's broken images in one line, return it, and begin a new epoch; None if all were sound."""
        line = self.summary()
        self.epoch.clear()
        if line is not None:
            warnings.warn(line, BrokenImageWarning, stacklevel=2)
        return line

    def _reason(self, index: int) -> str:
        inner: Any = self._dataset
        while isinstance(inner, Wrapped):
            if isinstance(inner, SkipBroken):
                return inner.reason(index) or "it opens now"
            inner = inner.dataset
        return "reason unknown"


def collate(batch: Sequence[tuple[Any, ...]]) -> tuple[Any, Tensor, Tensor]:
    """A batch of ``(image, target, broken)``, or of ``(image, target)``, such as a stream yields.

    Args:
        batch: samples; images as tensors or arrays of one shape.

    Returns:
        Images ``[B, ...]``, targets ``[B]`` int64 and broken ``[B]`` int64, with -1 for sound images.

    Example:
        >>> import torch
        >>> from gspn.data import collate
        >>> images, targets, broken = collate([(torch.zeros(3, 2, 2), 4, -1), (torch.ones(3, 2, 2), -1, 17)])
        >>> images.shape, targets, broken
        (torch.Size([2, 3, 2, 2]), tensor([ 4, -1]), tensor([-1, 17]))
    """
    images = default_collate([sample[0] for sample in batch])
    targets = torch.tensor([int(sample[1]) for sample in batch])
    broken = torch.tensor([int(sample[2]) if len(sample) > 2 else -1 for sample in batch])
    return images, targets, broken
