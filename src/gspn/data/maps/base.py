"""The base class of images with maps, and the classes that a map may have."""

from __future__ import annotations

import colorsys
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from ..._errors import UsageError
from ..._files import printable, read_text, short
from ..base import LabelledImages, digest_of
from ..images import CorruptImageError

Map = NDArray[np.float32]
"""``[H, W]``: the index of a class or a number for each pixel, NaN where it is ignored."""
MapTransform = Callable[[Image.Image, Map], Any]
Colour = tuple[int, int, int]

CLASSES_FILE = "classes.txt"
_COLOUR = re.compile(r"\s#[0-9a-fA-F]{6}")
_MOST_CLASSES = 65_536


@dataclass(frozen=True)
class MapClasses:
    """The classes of maps: their names, and the colours to draw them in.

    Raises:
        UsageError: there is no class, a name is empty or there twice, or colours are not one for each name.

    Example:
        >>> MapClasses(("water", "land"), ((0, 0, 255), (0, 128, 0))).names
        ('water', 'land')
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] = ()
    """One for each name; by default distinct hues."""

    def __post_init__(self) -> None:
        names = self.names
        if not names or len(names) > _MOST_CLASSES:
            raise UsageError(f"there are {len(names):,} classes; there have to be 1 to {_MOST_CLASSES:,}.")
        wrong = next((name for name, count in Counter(names).items() if not name or count > 1), None)
        if wrong is not None:
            raise UsageError(f"the class {short(wrong)} is {'there twice' if wrong else 'without a name'}.")
        if not self.colours:
            object.__setattr__(self, "colours", tuple(_hue(i) for i in range(len(names))))
        if len(self.colours) != len(names):
            raise UsageError(f"{len(names)} classes have {len(self.colours)} colours; give one for each.")


def _hue(index: int) -> Colour:
    # The golden ratio keeps hues apart however many there are.
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 0.95 - 0.25 * (index % 3))
    return round(255 * red), round(255 * green), round(255 * blue)


def read_classes(path: Path) -> MapClasses:
    """The classes of a text file: a name in each line, and after it perhaps a colour such as ``#1f5a99``.

    Raises:
        UsageError: a class has no name or stands there twice, or some have a colour and others not.
        OSError: it cannot be read.
    """
    lines = [line.strip() for line in read_text(path, most=1 << 24).splitlines() if line.strip()]
    endings = [len(line) - 8 if _COLOUR.fullmatch(line[-8:]) else len(line) for line in lines]
    names = tuple(line[:end].rstrip() for line, end in zip(lines, endings, strict=True))
    colours = [line[-6:] for line, end in zip(lines, endings, strict=True) if end < len(line)]
    if colours and len(colours) < len(lines):
        raise UsageError(f"{printable(path)}: {len(colours)} of {len(lines)} classes have a colour; give all or none.")
    try:
        return MapClasses(
            names,
            tuple((int(one[:2], 16), int(one[2:4], 16), int(one[4:], 16)) for one in colours),
        )
    except UsageError as error:
        raise UsageError(f"{printable(path)}: {error}") from None


class MappedImages(Dataset):
    """A map-style data set of images with a map of the same size. Subclasses define ``image``, ``map``, ``filename``.

    ``dataset[i]`` is ``(transform(image, map), i)``, or ``((image, map), i)`` without a transform: an RGB PIL image and
    a :data:`Map`. Maps hold either classes or, where ``unit`` is set, numbers.

    Attributes:
        map_classes: the classes; None for numbers.
        unit: the unit of the numbers, such as ``"m"``; None for classes.
        transform: may be set at any time.
    """

    def __init__(
        self, name: str, classes: MapClasses | None, unit: str | None = None, transform: MapTransform | None = None
    ) -> None:
        if (classes is None) == (unit is None):
            raise UsageError(f"{name!r} needs either classes or a unit.")
        self.name, self.map_classes, self.unit, self.transform = name, classes, unit, transform

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty for numbers."""
        return [] if self.map_classes is None else list(self.map_classes.names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB; a ``CorruptImageError`` if it cannot be decoded."""

    @abstractmethod
    def map(self, index: int) -> Map:
        """The map of image ``index``; a ``CorruptImageError`` if it cannot be decoded or has values out of range."""

    @abstractmethod
    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """A name for image ``index``."""

    def sample(self, index: int) -> tuple[Image.Image, Map]:
        """The image and the map.

        Raises:
            CorruptImageError: one of them cannot be decoded, or they differ in size.
        """
        image, values = self.image(index), self.map(index)
        if values.shape != (image.height, image.width):
            raise CorruptImageError(
                self.filename(index),
                f"the image is {image.width} x {image.height} and its map {values.shape[1]} x {values.shape[0]}",
            )
        return image, values

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index=} is out of range for {self!r}.")
        index %= len(self)
        image, values = self.sample(index)
        return (image, values) if self.transform is None else self.transform(image, values), index

    def identity(self) -> str:
        """A digest of the names of all images, in their order."""
        return digest_of(self.filename(i) for i in range(len(self)))

    def __repr__(self) -> str:
        what = f"{len(self.classes)} classes" if self.unit is None else self.unit
        return f"<{self.name}: {len(self)} images with maps, {what}>"


class ImagesOnly(LabelledImages):
    """The images of a :class:`MappedImages` alone: no map is read, there are no classes, and every target is 0."""

    def __init__(self, dataset: MappedImages) -> None:
        super().__init__(dataset.name, [])
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB; a ``CorruptImageError`` if it cannot be decoded."""
        return self.dataset.image(index)

    def target(self, index: int) -> int:
        """0."""
        del index
        return 0

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The name of image ``index``."""
        return self.dataset.filename(index, basename, absolute)

    def identity(self) -> str:
        """A digest of the names of all images, in their order."""
        return self.dataset.identity()


def checked_classes(classes: Sequence[str] | None) -> MapClasses | None:
    """The option ``classes`` of a data set."""
    if classes is None:
        return None
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise UsageError(f"classes={short(classes)} is not a list of names of classes.")
    return MapClasses(tuple(classes))
