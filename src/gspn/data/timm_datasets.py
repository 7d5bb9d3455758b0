"""Data sets that timm and torchvision open, with the interface of this package."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.dataset_factory import create_dataset
from torch.utils.data import Dataset

from .._files import printable
from .base import LabelledImages, Transform, digest_of
from .corrupt_images import CorruptImageWarning
from .folder import open_folder
from .images import MAX_PIXELS, CorruptImageError, load_image, row_folders, row_image, to_rgb
from .splits import TRAIN


class HubImages(LabelledImages):
    """The rows of ``hfds/``, which timm's reader opens; their images are decoded by ``load_image``.

    timm's own data set replaces a corrupt sample by the next one and reports it only in a log, opens any path that a
    row holds, may decode pixels late and has no limit on them.

    Args:
        reader: timm's ``ReaderHfds``.
        folders: the folders from which an image may be read if its row holds a path instead of bytes.
    """

    def __init__(
        self,
        reader: Any,
        name: str,
        folders: Sequence[Path] = (),
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(name, _class_names(reader), transform)
        self.reader, self.max_pixels = reader, max_pixels
        self._folders = folders

    def __len__(self) -> int:
        return len(self.reader)

    def target(self, index: int) -> int:
        """The class of image ``index``, -1 if it has none."""
        return self._sample(index)[1]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The path that row ``index`` holds, or the data set and the row."""
        return self.reader.filename(index, basename, absolute) or f"{self.name}/{index}"

    def identity(self) -> str:
        """A digest of the classes of all rows, in their order."""
        rows, key = self.reader.dataset, self.reader.label_key
        if key not in rows.column_names:
            return digest_of([str(len(self))])
        return digest_of(str(one) for batch in rows.select_columns([key]).iter(1000) for one in batch[key])

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        value = self.reader.dataset[index][self.reader.image_key]
        image = row_image(value, self._folders, max_pixels=self.max_pixels, name=self.filename(index))
        file, target, *_ = self.reader[index]
        file.close()
        return image, -1 if target is None else int(target)


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
        try:
            image, target = self.dataset[index]  # without a transform, so all that can fail is opening a file
        except (CorruptImageError, OSError):
            raise
        except Exception as error:
            raise CorruptImageError(self.filename(index), f"cannot be opened by torchvision ({error})") from error
        return to_rgb(image, name=self.filename(index)), int(target)

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

    def identity(self) -> str:
        """A digest of the names and classes of all images; of their number where a class needs an image decoded."""
        return digest_of([str(len(self))]) if getattr(self.dataset, "targets", None) is None else super().identity()


class Stream(IterableImageDataset):
    """A stream of ``(image, target)``, opened by timm (``wds/``, ``hfids/``, ``tfds/``), with ``name`` and ``classes``.

    A sample of a stream has no index, so ``SkipCorrupt`` and ``DeterministicAugmentation`` do not apply. What cannot be
    decoded is left out of ``wds/`` by timm's reader, and its number is said in a ``CorruptImageWarning`` when the
    iteration ends. In the other streams it is a ``CorruptImageError``.
    """

    def __init__(self, stream: IterableImageDataset, name: str, transform: Transform | None) -> None:
        super().__init__(None, stream.reader, transform=transform, target_transform=stream.target_transform)
        self.name = name
        self.classes = _class_names(stream.reader)

    def __iter__(self) -> Generator[tuple[Any, Any], Any, None]:
        samples, position = iter(self.reader), 0
        with _messages(f"timm.data.readers.{type(self.reader).__module__.rpartition('.')[2]}") as errors:
            while True:
                name = f"{self.name}, sample {position}"
                try:
                    image, target = next(samples)
                    image = to_rgb(image, name=name) if isinstance(image, Image.Image) else image
                except StopIteration:
                    break
                except CorruptImageError:
                    raise
                except (OSError, SyntaxError, ValueError) as error:
                    raise CorruptImageError(name, f"cannot be decoded ({error})") from error
                image = image if self.transform is None else self.transform(image)
                yield image, target if self.target_transform is None else self.target_transform(target)
                position += 1
        if errors:
            said = f"{self.name}: {len(errors):,} samples were corrupt and left out; the first: {printable(errors[0])}"
            warnings.warn(said, CorruptImageWarning, stacklevel=2)


@contextmanager
def _messages(logger: str) -> Iterator[list[str]]:
    """The warnings that a logger gets in the block."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(logger).removeHandler(handler)


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
    if name.lower() in ("torch/folder", "torch/image_folder"):
        # The same files as those of `folder`; torchvision's order of classes.
        options = {"split": split, "root": root or "", "transform": transform, "max_pixels": max_pixels, **options}
        folder = open_folder(**options)
        order = sorted(folder.classes)
        return folder if order == folder.classes else open_folder(**{"classes": order, **options})
    location = None if root is None else os.fspath(root)
    options.setdefault("is_training", split.partition("[")[0] in TRAIN)  # "train[:10%]" of hub and TensorFlow
    if name.lower().startswith(("wds/", "hfids/")):
        options.setdefault("input_img_mode", "")  # images as they are, which the stream converts by our rules
    dataset: Dataset = create_dataset(name, root=location, split=split, **options)
    if isinstance(dataset, IterableImageDataset):
        return Stream(dataset, name, transform)
    if isinstance(dataset, ImageDataset):
        own = Path(name.partition("/")[2])
        folders = row_folders(own if own.is_dir() else None, location)
        return HubImages(dataset.reader, name, folders, transform, max_pixels)
    return TorchvisionImages(dataset, name, transform)


def _class_names(reader: Any) -> list[str]:
    index = getattr(reader, "class_to_idx", None) or {}
    return [str(label) for label in sorted(index, key=lambda label: (index[label], str(label)))]
