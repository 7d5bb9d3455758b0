"""Data sets that timm and torchvision open, with the interface of this package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from .base import LabelledImages, Transform
from .images import MAX_PIXELS, CorruptImageError, load_image
from .splits import TRAIN, split_folder


class FileImages(LabelledImages):
    """The samples of a timm reader, each opened by ``load_image``.

    timm's own data set replaces a corrupt sample by the next one and reports it only in a log, may decode pixels late
    and has no limit on them. Here a corrupt file raises ``CorruptImageError`` with its name.

    Args:
        reader: ``reader[i]`` is ``(file, target)``; has ``filename(i)`` and ``class_to_idx``, as timm's readers do.
        classes: name of each target; None for those of the reader.

    Raises:
        ValueError: the reader has a class that is not among ``classes``.
    """

    def __init__(
        self,
        reader: Any,
        name: str,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        own = _class_names(reader)
        super().__init__(name, own if classes is None else classes, transform)
        unknown = [label for label in own if label not in self.classes]
        if unknown:
            raise ValueError(f"{name} has classes that are not in {classes=}: {unknown[:10]}.")
        self._index = [self.classes.index(label) for label in own]
        self.reader = reader
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.reader)

    def target(self, index: int) -> int:
        """The class of image ``index``, -1 if it has none."""
        if isinstance(self.reader, ReaderImageFolder):
            return self._class(self.reader.samples[index][1])
        targets = getattr(self.reader, "targets", None)
        return self._sample(index)[1] if targets is None else self._class(targets[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of image ``index``, within the data set unless ``absolute``."""
        return self.reader.filename(index, basename, absolute) or f"{self.name}/{index}"

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        # The reader returns file and target together, and some readers send a request for each sample.
        file, target, *_ = self.reader[index]
        with file:
            try:
                image = load_image(file, max_pixels=self.max_pixels)
            except CorruptImageError as error:
                # Only here, because some readers fetch the sample again to name it.
                raise CorruptImageError(self.filename(index), error.reason) from error
        return image, self._class(target)

    def _class(self, target: Any) -> int:
        if target is None:
            return -1
        return self._index[target] if self._index and target >= 0 else int(target)


class TorchvisionImages(LabelledImages):
    """A data set of torchvision, with RGB images."""

    def __init__(self, dataset: Any, name: str, transform: Transform | None = None) -> None:
        super().__init__(name, getattr(dataset, "classes", []), transform)
        self.dataset = dataset
        if hasattr(dataset, "loader"):  # folders of files
            dataset.loader = load_image

    def __len__(self) -> int:
        return len(self.dataset)

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return image.convert("RGB"), int(target)

    def target(self, index: int) -> int:
        """The class of image ``index``."""
        targets = getattr(self.dataset, "targets", None)
        return int(self.dataset[index][1] if targets is None else targets[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of image ``index``, if there is one."""
        samples = getattr(self.dataset, "samples", None)
        if samples is None:
            return super().filename(index)
        path = samples[index][0]
        return Path(path).name if basename else path if absolute else os.path.relpath(path, self.dataset.root)


class Stream(IterableImageDataset):
    """A stream of ``(image, target)``, opened by timm (``wds/``, ``hfids/``, ``tfds/``), with ``name`` and ``classes``.

    A sample of a stream has no index, so ``SkipCorrupt`` and ``DeterministicAugmentation`` do not apply. timm's
    WebDataset reader leaves out samples that cannot be decoded and logs the error; the other readers raise it.
    """

    def __init__(self, stream: IterableImageDataset, name: str, transform: Transform | None) -> None:
        super().__init__(None, stream.reader, transform=transform, target_transform=stream.target_transform)
        self.name = name
        self.classes = _class_names(stream.reader)


def open_folder(
    split: str,
    root: str | os.PathLike[str],
    *,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    search_split: bool = True,
    **options: Any,
) -> FileImages:
    """Open a folder of class folders, or a tar of one; see ``open_dataset``."""
    path = Path(root)
    if not (path.suffix == ".tar" and path.is_file()):
        path = split_folder(path, split if search_split else "all")
    try:
        dataset: Any = create_dataset("", root=str(path), search_split=False, **options)
    except RuntimeError as error:  # no image found; timm's message names the folder and the extensions
        raise ValueError(str(error)) from error
    return FileImages(dataset.reader, "folder", classes, transform, max_pixels)


def open_with_timm(
    name: str,
    split: str,
    root: str | os.PathLike[str] | None,
    *,
    transform: Transform | None = None,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> LabelledImages | Stream:
    """Open any other data set of ``timm.data.create_dataset``; see ``open_dataset``."""
    location = None if root is None else os.fspath(root)
    options.setdefault("is_training", split.partition("[")[0] in TRAIN)  # "train[:10%]" of hub and TensorFlow
    dataset: Dataset = create_dataset(name, root=location, split=split, **options)
    if isinstance(dataset, IterableImageDataset):
        return Stream(dataset, name, transform)
    if isinstance(dataset, ImageDataset):
        return FileImages(dataset.reader, name, None, transform, max_pixels)
    return TorchvisionImages(dataset, name, transform)


def _class_names(reader: Any) -> list[str]:
    # The reader of tar files has another attribute.
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    return sorted(index, key=lambda label: index[label])
