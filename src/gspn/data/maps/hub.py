"""Data sets with maps of the package ``datasets``: from the Hugging Face hub, or local."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..._errors import UsageError
from ..captions.hub import load_rows
from ..images import MAX_PIXELS, row_file, row_image
from .base import Map, MappedImages, MapTransform, checked_classes
from .decoding import MapRule, load_map


class MappedRows(MappedImages):
    """The rows of a ``datasets.Dataset`` with a column of images and one of maps; neither is decoded by ``datasets``.

    Args:
        dataset: a map-style data set.
        name: its name.
        folders: the folders from which a file may be read if its row holds a path instead of bytes.
        image_column: a column of type ``Image``, or of bytes.
        map_column: the same for maps.

    Raises:
        UsageError: a column is missing or of another type, or there are neither classes nor a unit.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        folders: Sequence[Path] = (),
        *,
        image_column: str = "image",
        map_column: str = "label",
        classes: Sequence[str] | None = None,
        unit: str | None = None,
        ignore: float | None = 255,
        first: int = 0,
        scale: float = 1.0,
        transform: MapTransform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if classes is None and unit is None:
            raise UsageError(f"{name!r} does not name the classes; pass classes=[...] or, for numbers, unit=NAME.")
        named = checked_classes(classes)
        super().__init__(name, named, unit, transform)
        self.rule, self.max_pixels, self._folders = MapRule(named, ignore, first, scale), max_pixels, folders
        self._columns = image_column, map_column
        image = importlib.import_module("datasets").Image
        rows = dataset.with_format(None)  # a saved format would return tensors
        for option, column in (("image_column", image_column), ("map_column", map_column)):
            if column not in rows.column_names:
                names = ", ".join(map(repr, rows.column_names[:10]))
                raise UsageError(f"{option}={column!r} is not a column of {name!r}; pass {option}= one of {names}.")
            feature = rows.features[column]
            if isinstance(feature, image):
                rows = rows.cast_column(column, image(decode=False))
            elif getattr(feature, "dtype", "") not in ("binary", "large_binary"):
                raise UsageError(f"{option}={column!r} of {name!r} is of type {feature}; pass one of images.")
        self._rows = rows.select_columns(list(dict.fromkeys(self._columns)))

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        value, name = self._rows[index][self._columns[0]], self.filename(index)
        return row_image(value, self._folders, max_pixels=self.max_pixels, name=name)

    def map(self, index: int) -> Map:
        """The map of image ``index``."""
        value, name = self._rows[index][self._columns[1]], self.filename(index)
        return load_map(row_file(value, self._folders, name=name), self.rule, max_pixels=self.max_pixels, name=name)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The data set and the row."""
        del basename, absolute
        return f"{self.name}/{index}"


def open_mapped_rows(
    name: str,
    split: str,
    root: str | os.PathLike[str] | None,
    *,
    config: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> MappedRows:
    """Open ``hfds/<name>``; see ``open_maps``."""
    rows, folders = load_rows(name, split, root, config=config, revision=revision)
    return MappedRows(rows, name, folders, **options)
