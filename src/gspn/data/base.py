"""Base classes of the data sets."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

Transform = Callable[[Image.Image], Any]


class LabelledImages(Dataset):
    """A map-style data set of images and class indices. Subclasses define ``image`` or, with the target, ``_sample``.

    ``dataset[i]`` is ``(image, target)``: an RGB PIL image, or the result of ``transform``, and an int.

    Attributes:
        classes: name of each target.
        transform: may be set at any time, as timm does.
    """

    def __init__(self, name: str, classes: Sequence[str], transform: Transform | None = None) -> None:
        self.name = name
        self.classes = list(classes)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self._sample(self._position(index))
        return image if self.transform is None else self.transform(image), target

    @abstractmethod
    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform; a :class:`CorruptImageError` if it cannot be decoded."""
        return self._sample(index)[0]

    @abstractmethod
    def target(self, index: int) -> int:
        """The class of image ``index``, without decoding it."""

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """A name for image ``index``; timm's flags have no effect where there is no file."""
        del basename, absolute
        return f"{self.name}/{index}"

    def identity(self) -> str:
        """A digest of what the images are: the name and the class of each, in their order, but no pixels.

        It does not depend on where the files are, so that a run can be resumed after its data were moved.
        """
        return digest_of(f"{self.filename(i)}\0{self.target(i)}" for i in range(len(self)))

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), self.target(index)

    def _position(self, index: int) -> int:
        """``index`` counted from the beginning, for a negative one."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index=} is out of range for {self!r}.")
        return index % len(self)

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} images, {len(self.classes)} classes>"


def digest_of(parts: Iterable[str]) -> str:
    """A digest of texts in their order, also of names that are not UTF-8.

    Example:
        >>> digest_of(["a", "b"]) == digest_of(["ab"])
        False
    """
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode("utf-8", "surrogatepass") + b"\n\0")
    return hasher.hexdigest()[:32]


class Wrapped(Dataset):
    """A data set around another map-style data set, whose name, classes and transform it passes on.

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
        """The name of sample ``index``."""
        inner = getattr(self.dataset, "filename", None)
        return f"{self.name}/{index}" if inner is None else inner(index, basename, absolute)


class Relabelled(Wrapped):
    """A map-style data set whose targets are the indices of the same class names in another order.

    Raises:
        ValueError: ``classes`` are other names.
    """

    def __init__(self, dataset: Dataset, classes: Sequence[str]) -> None:
        super().__init__(dataset)
        index = {name: i for i, name in enumerate(classes)}
        own = super().classes
        if set(own) != set(index):
            raise ValueError(f"{self.name} has the classes {own[:10]} and not {list(classes)[:10]}.")
        self._classes, self._index = list(classes), [index[name] for name in own]

    @property
    def classes(self) -> list[str]:
        """The names in their new order."""
        return self._classes

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        return image, self._index[target] if target >= 0 else target
