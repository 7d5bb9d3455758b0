"""Data sets with captions of the package ``datasets``: from the Hugging Face hub, or local."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..base import Transform
from ..images import MAX_PIXELS, row_folders, row_image
from ..splits import find_split
from .base import IMAGE_COLUMN, TEXT_COLUMN, CaptionedImages
from .parsing import clean, some

# Files by which a folder is recognized as saved by datasets.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_ROWS = 1000


class CaptionedRows(CaptionedImages):
    """The rows of a ``datasets.Dataset`` with a column of images and one of captions.

    Images are decoded by ``load_image`` and not by ``datasets``.

    Args:
        dataset: a map-style data set.
        image_column: a column of type ``Image``, or of bytes.
        caption_column: a column of strings, or of lists of strings.
        folders: the folders from which an image may be read if its row holds a path instead of bytes. A path is part
            of the data, which nobody has checked.

    Raises:
        ValueError: a column is missing or of another type, or a row has no caption.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        *,
        image_column: str = IMAGE_COLUMN,
        caption_column: str = TEXT_COLUMN,
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
        folders: Sequence[Path] = (),
    ) -> None:
        super().__init__(name, transform)
        self.max_pixels = max_pixels
        self._folders = folders
        dataset = dataset.with_format(None)  # a saved format would return tensors
        for option, value in (("image_column", image_column), ("caption_column", caption_column)):
            if value not in dataset.column_names:
                columns = some(map(repr, dataset.column_names))
                raise ValueError(f"{option}={value!r} is not a column of {name!r}; pass {option}= one of {columns}.")
        feature = dataset.features[image_column]
        image = _datasets().Image
        if not isinstance(feature, image) and getattr(feature, "dtype", "") not in ("binary", "large_binary"):
            raise ValueError(f"{image_column=} of {name!r} is of type {feature}; pass one of images or their bytes.")
        self._column = image_column
        self._images = dataset.select_columns([image_column])
        if isinstance(feature, image):
            self._images = self._images.cast_column(image_column, image(decode=False))
        without: list[str] = []
        for batch in dataset.select_columns([caption_column]).iter(_ROWS):
            for value in batch[caption_column]:
                where = f"{name}, row {len(self.texts)}, {caption_column!r}"
                captions = clean(value, where)
                if not captions:
                    without.append(f"row {len(self.texts)}")
                self.texts.append(captions)
        if without:
            raise ValueError(
                f"{len(without):,} of {len(self):,} images of {name!r} have no caption in {caption_column!r}: "
                f"{some(without)}. Leave them out with datasets' filter, save the rest with save_to_disk(folder), and "
                "open 'hfds/<folder>'."
            )
        if not len(self):
            raise ValueError(f"{name!r} has no rows; pass another split.")

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB; a ``CorruptImageError`` if the row holds no image or a path outside the data set."""
        index = self._position(index)
        value = self._images[index][self._column]
        return row_image(value, self._folders, max_pixels=self.max_pixels, name=self.filename(index))

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The data set and the row of image ``index``."""
        return super().filename(self._position(index), basename, absolute)


def open_rows(
    name: str,
    split: str,
    root: str | os.PathLike[str] | None,
    *,
    config: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> CaptionedRows:
    """Open ``hfds/<name>``; see ``open_captions``."""
    rows, folders = load_rows(name, split, root, config=config, revision=revision)
    return CaptionedRows(rows, name, folders=folders, **options)


def load_rows(
    name: str, split: str, root: str | os.PathLike[str] | None, *, config: str | None, revision: str | None
) -> tuple[Any, Sequence[Path]]:
    """The ``datasets.Dataset`` of ``hfds/<name>``, and the folders that paths in its rows may lead to."""
    datasets = _datasets()
    rest = name.partition("/")[2]
    local = next((path for path in (*([Path(root) / rest] if root else []), Path(rest)) if path.is_dir()), None)
    if local is not None and any((local / mark).is_file() for mark in (_SAVED, _SAVED_SPLITS)):
        if config or revision:
            raise ValueError(f"{config=}, {revision=} do not apply to {str(local)!r}, which was saved to disk.")
        return _saved(local, split), ()
    cache = None if root is None or local is not None else os.fspath(root)
    dataset = datasets.load_dataset(str(local or rest), config, split=split, revision=revision, cache_dir=cache)
    return dataset, row_folders(local, cache)


def _saved(folder: Path, split: str) -> Any:
    datasets = _datasets()
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {}
    chosen = find_split(split, splits.keys(), repr(str(folder)))
    if chosen != "all":
        return splits[chosen]
    return datasets.concatenate_datasets([*splits.values()]) if splits else saved


def _datasets() -> Any:
    # Imported here, because doctests import this module where datasets is not installed.
    return importlib.import_module("datasets")
