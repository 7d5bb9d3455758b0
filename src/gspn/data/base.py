"""What all data sets of gspn have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

Transform = Callable[[Image.Image], Any]

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "eval", "evaluation", "test")


def is_train_split(split: str) -> bool:
    """Whether a name of a split means the part that is trained on."""
    return split.partition("[")[0] in _TRAIN


def canonical_split(split: str, name: str) -> str:
    """``"train"``, ``"val"`` or ``"all"`` for any of their usual names.

    Raises:
        ValueError: another name.
    """
    if split in _TRAIN:
        return "train"
    if split in _VAL:
        return "val"
    if split == "all":
        return "all"
    raise ValueError(f"{split=} is no split of {name}; it has 'train', 'val' (also called 'test') and 'all'.")


def first_fifths(targets: Sequence[int], split: str) -> list[int]:
    """Indices of a split that takes four fifths of each class, rounded down, in the order of the file for training.

    No random generator has a part in it, so no version of one can change it.
    """
    if split == "all":
        return list(range(len(targets)))
    seen: dict[int, int] = {}
    total = {target: list(targets).count(target) for target in set(targets)}
    chosen = []
    for index, target in enumerate(targets):
        position = seen.get(target, 0)
        seen[target] = position + 1
        if (position < total[target] * 4 // 5) == (split == "train"):
            chosen.append(index)
    return chosen


class LabelledImages(Dataset):
    """A map-style data set of images and class indices.

    ``dataset[i]`` is ``(image, target)``: a PIL image, RGB, or what ``transform`` makes of it, and an int.

    Attributes:
        name: of the data set.
        classes: the name of each target.
        transform: applied to each image; None for none. May be set at any time, as timm does.
    """

    def __init__(self, name: str, classes: Sequence[str], transform: Transform | None = None) -> None:
        self.name = name
        self.classes = list(classes)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index=} is out of range for {self!r}.")
        index %= len(self)
        image = self.image(index)
        if self.transform is not None:
            image = self.transform(image)
        return image, self.target(index)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""

    @abstractmethod
    def target(self, index: int) -> int:
        """The class of image ``index``, without decoding it."""

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """A name for image ``index``; the flags are timm's, and mean nothing where there is no file."""
        del basename, absolute
        return f"{self.name}/{index}"

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} images, {len(self.classes)} classes>"


class Wrapped(Dataset):
    """A data set around another map-style one, whose names, classes and transform it passes on.

    Raises:
        TypeError: the data set has no ``__getitem__`` and ``__len__``.
    """

    def __init__(self, dataset: Dataset) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or hasattr(dataset, "__iter__"):
            raise TypeError(
                f"{type(self).__name__} needs a map-style data set, with __getitem__ and __len__; "
                f"{type(dataset).__name__} is a stream."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]  (checked above)

    @property
    def name(self) -> str:
        """The name of the inner data set."""
        return getattr(self.dataset, "name", type(self.dataset).__name__)

    @property
    def classes(self) -> list[str]:
        """The name of each target."""
        return getattr(self.dataset, "classes", [])

    @property
    def transform(self) -> Transform | None:
        """The transform of the inner data set; may be set."""
        return getattr(self.dataset, "transform", None)

    @transform.setter
    def transform(self, transform: Transform | None) -> None:
        self.dataset.transform = transform  # pyright: ignore[reportAttributeAccessIssue]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """A name for sample ``index``."""
        named = getattr(self.dataset, "filename", None)
        return f"{self.name}/{index}" if named is None else named(index, basename, absolute)
