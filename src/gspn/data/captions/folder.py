"""A folder of images with captions in files beside them."""

from __future__ import annotations

import csv
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from PIL import Image

from ..._files import open_regular
from ..base import Transform
from ..files import NOT_IMAGES, OUTSIDE, LeftOut, is_image, walk
from ..images import EXTENSIONS, MAX_PIXELS, load_image
from ..splits import split_folder
from .base import TEXT_COLUMN, CaptionedImages
from .parsing import MAX_RECORD, MAX_TEXT, clean, column, cut, decode, lines_of, record_of, some

_METADATA = ("metadata.jsonl", "metadata.csv")
_MAX_METADATA = 1 << 30


class CaptionedFolder(CaptionedImages):
    """The images below a folder, in the order of their paths.

    The captions of ``a.png`` are the lines of ``a.txt`` beside it, or the rows of a ``metadata.jsonl`` or
    ``metadata.csv`` that name it as ``file_name``. :func:`~gspn.data.files.walk` says what is left out.

    Args:
        root: the folder of the splits, or of a single one; see :func:`~gspn.data.splits.split_folder`.
        split: the split.
        caption_column: the column of ``metadata.jsonl`` and ``metadata.csv`` with the captions.

    Attributes:
        left_out: what is left out.

    Raises:
        ValueError: the split is missing, an image has no caption, or a file of captions is damaged, ambiguous or names
            an image that is missing.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        caption_column: str = TEXT_COLUMN,
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__("folder", transform)
        self.root = split_folder(Path(root), split)
        self.max_pixels = max_pixels
        self.left_out = LeftOut()
        files = walk(self.root, self.left_out)
        self._paths = [path for path in files if is_image(path)]
        others = {path for path in files if not is_image(path)}
        used = {path for path in others if posixpath.basename(path) in _METADATA}
        used |= others & {_beside(path) for path in self._paths}
        self.left_out.add(NOT_IMAGES, *sorted(others - used))
        if not self._paths:
            raise ValueError(
                f"root={str(self.root)!r} holds no image ({', '.join(sorted(EXTENSIONS))}); {self.left_out}."
            )
        self._read_captions(used, self._read_metadata(used, Path(root), caption_column))

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        path = self._paths[self._position(index)]
        return load_image(self.root / path, max_pixels=self.max_pixels, name=path)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of image ``index``, within the folder unless ``absolute``."""
        path = self._paths[self._position(index)]
        return posixpath.basename(path) if basename else str(self.root / path) if absolute else path

    def _read_metadata(self, files: set[str], root: Path, caption_column: str) -> dict[str, tuple[str, ...]]:
        """The captions of all metadata, by the path of the image."""
        own = "" if self.root == root else self.root.name + "/"
        metadata = [own + path for path in files if posixpath.basename(path) in _METADATA]
        if own:  # the metadata of all splits may be above their folders
            above = [name for name in _METADATA if (root / name).is_file()]
            metadata += [name for name in above if (root / name).resolve().is_relative_to(root.resolve())]
            self.left_out.add(OUTSIDE, *(f"../{name}" for name in above if name not in metadata))
        folders = Counter(posixpath.dirname(path) for path in metadata)
        twice = sorted(str(root / folder) for folder, count in folders.items() if count > 1)
        if twice:
            raise ValueError(f"{some(twice)} holds both metadata.jsonl and metadata.csv; remove one.")
        captions: dict[str, tuple[str, ...]] = {}
        missing = []
        images = set(self._paths)
        for path in sorted(metadata):
            for name, value, where in _rows(root / path, caption_column):
                image = posixpath.normpath(posixpath.join(posixpath.dirname(path), _inside(name, where)))
                if not image.startswith(own):  # it belongs to another split
                    continue
                image = image.removeprefix(own)
                if image in images:
                    captions[image] = (*captions.get(image, ()), *clean(value, where))
                else:
                    missing.append(image)
        if missing:
            raise ValueError(
                f"root={str(self.root)!r} lacks {len(missing):,} images that its metadata names: {some(missing)}. "
                f"Add them or remove their rows. Only images of this folder count; {self.left_out}."
            )
        return captions

    def _read_captions(self, files: set[str], metadata: dict[str, tuple[str, ...]]) -> None:
        without = []
        for path in self._paths:
            beside = _beside(path)
            captions = metadata.get(path, ())
            if beside in files:
                if path in metadata:
                    raise ValueError(f"{path} has captions in {beside} and in metadata; remove one of them.")
                with open_regular(self.root / beside) as file:
                    captions = clean(lines_of(file.read(MAX_TEXT + 1), beside), beside)
            if not captions:
                without.append(path)
            self.texts.append(captions)
        if without:
            raise ValueError(
                f"root={str(self.root)!r}: {len(without):,} of {len(self):,} images have no caption: {some(without)}."
                " Write it into a .txt of the same name beside each, one caption a line, or into metadata.jsonl "
                f'({{"file_name": "...", "{TEXT_COLUMN}": "..."}}) or metadata.csv, or remove the images; '
                f"{self.left_out}."
            )


def _beside(image: str) -> str:
    return posixpath.splitext(image)[0] + ".txt"


def _inside(name: Any, where: str) -> str:
    """Check that a ``file_name`` stays below the folder of its metadata."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: file_name={cut(repr(name))} is not the name of a file.")
    windows = PureWindowsPath(name)  # knows both slashes and drives, any of which a hostile name may use
    if windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{where}: file_name={cut(repr(name))} leaves the folder; write it relative, without '..'.")
    return name


def _rows(file: Path, caption_column: str) -> Iterator[tuple[Any, Any, str]]:
    """``file_name``, caption and position of each row of metadata."""
    if file.stat().st_size > _MAX_METADATA:
        raise ValueError(f"{file} has more than {_MAX_METADATA:,} bytes; divide it, or store the images in shards.")
    with open_regular(file) as opened:
        if file.suffix == ".jsonl":
            rows = ((record_of(line, where), where) for line, where in _lines(opened, file) if line.strip())
        else:
            rows = _csv_rows(opened, file)
        for record, where in rows:
            if "file_name" not in record:
                raise ValueError(f"{where} has no 'file_name'; it has {some(map(repr, record))}.")
            yield record["file_name"], column(record, caption_column, where), where


def _csv_rows(opened: IO[bytes], file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.DictReader((decode(line, where) for line, where in _lines(opened, file)), strict=True)
    try:
        columns = reader.fieldnames or ()
        if len(set(columns)) < len(columns):
            raise ValueError(f"{file}, line 1 names a column twice: {some(columns)}.")
        for record in reader:
            where = f"{file}, line {reader.line_num}"
            if None in record or None in record.values():
                raise ValueError(
                    f"{where} does not have the {len(columns)} fields of the first line; put quotes "
                    "around values that contain a comma."
                )
            yield record, where
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num} is not CSV: {error}.") from error


def _lines(opened: IO[bytes], file: Path) -> Iterator[tuple[bytes, str]]:
    """Each line and its position."""
    for number, line in enumerate(iter(lambda: opened.readline(MAX_RECORD + 1), b""), start=1):
        where = f"{file}, line {number}"
        if len(line) > MAX_RECORD:
            raise ValueError(f"{where} has more than {MAX_RECORD:,} bytes.")
        yield line, where
