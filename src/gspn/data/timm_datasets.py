"""What timm and torchvision open, brought to the interface of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset

from gspn.data.base import LabelledImages, Transform, is_train_split
from gspn.data.images import MAX_PIXELS, BrokenImageError, load_image

# timm's names for the folders of a split.
_SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")
_TRAIN_FOLDERS = _SPLIT_FOLDERS[:2]
_VAL_FOLDERS = _SPLIT_FOLDERS[2:7]


class FileImages(LabelledImages):
    """The samples of a timm reader, each opened by ``load_image``.

    timm's own data set puts the next sample in the place of a broken one and says so in a log alone; its pixels may be
    decoded late, and there is no limit on them. Here a broken file raises ``BrokenImageError`` with its name.

    Args:
        reader: ``reader[i]`` is ``(file, target)``; with ``filename(i)`` and ``class_to_idx``, as timm's have.
        name: of the data set.
        classes: the name of each target; None for those of the reader.
        transform: applied to each image.
        max_pixels: of an image that is decoded.

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
        found = _names(reader)
        super().__init__(name, found if classes is None else classes, transform)
        unknown = [label for label in found if label not in self.classes]
        if unknown:
            raise ValueError(f"{name} has classes that are not in the given ones: {unknown[:10]}.")
        self._index = [self.classes.index(label) for label in found]
        self.reader = reader
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        # The reader gives file and target at once, and reading one twice costs a request in some.
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index=} is out of range for {self!r}.")
        index %= len(self)
        image, target = self._sample(index)
        if self.transform is not None:
            image = self.transform(image)
        return image, target

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        return self._sample(index)[0]

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
        file, target, *_ = self.reader[index]
        with file:
            try:
                image = load_image(file, max_pixels=self.max_pixels)
            except BrokenImageError as error:
                # Asked for here alone, as some readers fetch the sample for it; what the reader opens may have no name.
                raise BrokenImageError(self.filename(index), error.reason) from error
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

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        image = image.convert("RGB")
        if self.transform is not None:
            image = self.transform(image)
        return image, int(target)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        return self.dataset[index][0].convert("RGB")

    def target(self, index: int) -> int:
        """The class of image ``index``."""
        targets = getattr(self.dataset, "targets", None)
        return int(self.dataset[index][1] if targets is None else targets[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of image ``index`` where there is one."""
        samples = getattr(self.dataset, "samples", None)
        if samples is None:
            return super().filename(index)
        path = samples[index][0]
        return Path(path).name if basename else path if absolute else os.path.relpath(path, self.dataset.root)


class Stream(IterableDataset):
    """A stream of ``(image, target)``, opened by timm: ``wds/``, ``hfids/``, ``tfds/``.

    A sample of a stream has no index, so ``SkipBroken`` and ``Seeded`` do not apply. timm's WebDataset reader leaves
    out samples that cannot be decoded and names the error in its log; the others raise.
    """

    def __init__(self, stream: IterableImageDataset, name: str) -> None:
        self.stream = stream
        self.name = name
        self.classes = _names(stream.reader)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        stream: Any = self.stream  # timm types its samples by everything that a reader may yield
        return iter(stream)

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def transform(self) -> Transform | None:
        """Applied to each image; may be set."""
        return self.stream.transform

    @transform.setter
    def transform(self, transform: Transform | None) -> None:
        self.stream.transform = transform

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: the order of the shards depends on it."""
        self.stream.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """The number of workers that will read, by which the reader divides its shards."""
        self.stream.set_loader_cfg(num_workers)


def open_folder(
    split: str,
    root: str | os.PathLike[str] | None,
    *,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    search_split: bool = True,
    **options: Any,
) -> FileImages:
    """A folder of class folders, or a tar of one; see ``open_dataset``."""
    if root is None:
        raise ValueError(f"{root=}: a folder data set needs root, the folder that holds train/ and val/.")
    path = Path(root)
    if not (path.is_dir() or (path.suffix == ".tar" and path.is_file())):
        raise ValueError(f"root={os.fspath(root)!r} is neither a folder nor a .tar file.")
    if path.is_dir() and search_split:
        path = _split_folder(path, split)
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
    """Anything else that ``timm.data.create_dataset`` opens; see ``open_dataset``."""
    location = None if root is None else os.fspath(root)
    options.setdefault("is_training", is_train_split(split))
    dataset: Dataset = create_dataset(name, root=location, split=split, **options)
    if isinstance(dataset, IterableImageDataset):
        dataset.transform = transform
        return Stream(dataset, name)
    if isinstance(dataset, ImageDataset):
        return FileImages(dataset.reader, name, None, transform, max_pixels)
    return TorchvisionImages(dataset, name, transform)


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split, by timm's rule, except that the root itself never stands in for a missing one."""
    wanted = [split.partition("[")[0]]
    if wanted[0] in _TRAIN_FOLDERS:
        wanted += _TRAIN_FOLDERS
    elif wanted[0] in _VAL_FOLDERS:
        wanted += _VAL_FOLDERS
    for name in wanted:
        if (root / name).is_dir():
            return root / name
    present = [name for name in _SPLIT_FOLDERS if (root / name).is_dir()]
    raise ValueError(
        f"root={str(root)!r} has no folder for {split=}; of {list(dict.fromkeys(wanted))} none exists"
        + (f", but {present}" if present else "")
        + ". Pass search_split=False to open the root itself, whatever the split."
    )


def _names(reader: Any) -> list[str]:
    # The reader of tar files calls it otherwise.
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    return sorted(index, key=lambda label: index[label])
