"""Data sets of the package ``datasets`` with captions: of the Hugging Face hub, or local."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from gspn.data.base import Transform
from gspn.data.captions.emoji import IMAGE_COLUMN, CaptionedImages
from gspn.data.captions.parsing import TEXT_COLUMN, CaptionTexts, clean, some, split_names, undivided
from gspn.data.images import MAX_PIXELS, BrokenImageError, load_image

# What datasets writes beside what it saves.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_ROWS = 1000


class CaptionedRows(CaptionedImages):
    """The rows of a ``datasets.Dataset`` with a column of images and one of captions.

    ``datasets`` decodes no image: the bytes go to ``load_image``. All captions are read at once, so that no run ends
    at a missing one.

    Args:
        dataset: map-style.
        name: of the data set.
        image_column: of type ``Image``, or bytes.
        caption_column: strings, or lists of strings.
        transform: applied to each image.
        max_pixels: of an image that is decoded.
        folders: from which an image may be read where the row holds no bytes but a path. A path is part of the
            data, which nobody has checked.

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
        folders: tuple[str | os.PathLike[str], ...] = (),
    ) -> None:
        super().__init__(name, transform)
        self.max_pixels = max_pixels
        self._folders = tuple(Path(folder).resolve() for folder in folders)
        dataset = dataset.with_format(None)  # one that was saved with a format gives tensors
        for option, asked in (("image_column", image_column), ("caption_column", caption_column)):
            if asked not in dataset.column_names:
                raise ValueError(
                    f"{option}={asked!r} is no column of {name!r}, which has {some(map(repr, dataset.column_names))}; "
                    f"pass {option}=..."
                )
        feature = dataset.features[image_column]
        image = _datasets().Image
        if not isinstance(feature, image) and getattr(feature, "dtype", "") not in ("binary", "large_binary"):
            raise ValueError(
                f"{image_column=} of {name!r} is of type {feature}; pass a column of images or of their bytes."
            )
        self._column = image_column
        self._images = dataset.select_columns([image_column])
        if isinstance(feature, image):
            self._images = self._images.cast_column(image_column, image(decode=False))
        self._texts = CaptionTexts()
        without: list[str] = []
        for batch in dataset.select_columns([caption_column]).iter(_ROWS):
            for value in batch[caption_column]:
                where = f"{name}, row {len(self._texts)}, {caption_column!r}"
                captions = clean(value, where)
                if not captions:
                    without.append(f"row {len(self._texts)}")
                self._texts.append(captions)
        if without:
            raise ValueError(
                f"{len(without):,} of {len(self):,} images of {name!r} have no caption in {caption_column!r}: "
                f"{some(without)}. Leave them out with datasets' filter, save the rest with save_to_disk(folder), and "
                "open 'hfds/<folder>'."
            )
        if not len(self):
            raise ValueError(f"{name!r} has no rows; pass another split.")

    def __len__(self) -> int:
        return len(self._texts)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform.

        Raises:
            BrokenImageError: it cannot be decoded, the row holds none, or a path that leads elsewhere.
        """
        index = self._place(index)
        name = self.filename(index)
        found = self._images[index][self._column]
        found = found if isinstance(found, dict) else {"bytes": found}
        if found.get("bytes"):
            return load_image(io.BytesIO(found["bytes"]), max_pixels=self.max_pixels, name=name)
        if not found.get("path"):
            raise BrokenImageError(name, "the row holds no image")
        path = Path(found["path"]).resolve()
        if not (path.is_file() and any(path.is_relative_to(folder) for folder in self._folders)):
            raise BrokenImageError(name, f"the row holds no bytes, and {str(path)!r} is no file of this data set")
        return load_image(path, max_pixels=self.max_pixels, name=name)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of image ``index``."""
        return self._texts[self._place(index)]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The data set and the row of image ``index``."""
        return super().filename(self._place(index), basename, absolute)


def open_rows(
    name: str,
    split: str,
    root: str | os.PathLike[str] | None,
    *,
    config: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> CaptionedRows:
    """``hfds/<name>``; see ``open_captions``."""
    datasets = _datasets()
    rest = name.partition("/")[2]
    local = next((path for path in (*([Path(root) / rest] if root else []), Path(rest)) if path.is_dir()), None)
    if local is not None and any((local / mark).is_file() for mark in (_SAVED, _SAVED_SPLITS)):
        if config or revision:
            raise ValueError(f"{config=}, {revision=} have no meaning for {str(local)!r}, which was saved to disk.")
        return CaptionedRows(_saved(name, local, split), name, **options)
    cache = None if root is None or local is not None else os.fspath(root)
    dataset = _load(
        name, datasets.load_dataset, str(local or rest), config, split=split, revision=revision, cache_dir=cache
    )
    folders = (local,) if local else (cache or datasets.config.HF_DATASETS_CACHE, datasets.config.HF_HUB_CACHE)
    return CaptionedRows(dataset, name, folders=folders, **options)


def _saved(name: str, folder: Path, split: str) -> Any:
    datasets = _datasets()
    found = _load(name, datasets.load_from_disk, str(folder))
    if not isinstance(found, datasets.DatasetDict):
        undivided(split, f"{str(folder)!r}")
        return found
    if split == "all":
        return datasets.concatenate_datasets([*found.values()])
    for one in split_names(split):
        if one in found:
            return found[one]
    raise ValueError(f"{split=} is no split of {str(folder)!r}, which has {some(map(repr, found))}, and 'all'.")


def _load(name: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return load(*args, **options)
    except (OSError, ValueError, ImportError, MemoryError):  # these say what is wrong
        raise
    except Exception as error:  # datasets and pyarrow raise whatever their parsing meets
        raise ValueError(
            f"{name!r} cannot be opened by datasets: {type(error.__cause__ or error).__name__}, "
            f"{error.__cause__ or error}. Write or fetch it again."
        ) from error


def _datasets() -> Any:
    # Not at the top, as this file is collected by tests where datasets is not installed.
    return importlib.import_module("datasets")
