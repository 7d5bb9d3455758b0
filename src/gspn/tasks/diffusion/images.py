"""Image files: PNGs that hold their record, and sets of images that are compared."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..._errors import UsageError, require
from ..._files import open_regular, printable, replaced
from ..core.loaders import open_data
from .archives import read_npz
from .digests import digest

METADATA = "gspn"
"""The key of a PNG's text under which its record is written, as JSON."""

_GRID = ("grid of all images", "grids of all images")
_MOST_TEXT = 1 << 20  # characters of a record


# --- A sampled image and its record -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """How an image was sampled; written into its file. A task derives from it and adds what its images depend on."""

    index: int
    """Position among the images of the call; the file's name."""
    seed: int
    height: int
    width: int
    steps: int
    guidance: float
    scheduler: str
    """The class of diffusers."""

    def path(self, directory: Path) -> Path:
        """The file of the image."""
        return directory / f"{self.index:05d}.png"


def save_png(path: Path, image: Image.Image, record: ImageRecord | None = None) -> None:
    """Write a PNG, in place of the file as a whole, with the record in its text."""
    info = PngInfo()
    if record is not None:
        info.add_text(METADATA, json.dumps(asdict(record)))
    with replaced(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a PNG; empty if there is none, or the file is damaged."""
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG",)) as image:
            image.load()
            text = getattr(image, "text", {}).get(METADATA, "{}")
            record = json.loads(text) if len(text) <= _MOST_TEXT else {}
    except Exception:  # Pillow raises any error for a damaged file, and json for a record that nobody sampled
        return {}
    return record if isinstance(record, dict) else {}


def is_sampled(directory: Path, record: ImageRecord) -> bool:
    """Whether the image of a record is in the directory, whole."""
    return read_record(record.path(directory)) == json.loads(json.dumps(asdict(record)))


# --- Sets of images ---------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """Images of one size, in memory as bytes."""

    name: str
    pixels: Tensor
    """``[N, 3, H, W]``, uint8."""
    labels: list[int]
    """The number of the class that each image was sampled for or has; -1 where it is unknown."""
    names: list[str]
    broken: list[str] = field(default_factory=list)
    """Those that could not be read, and do not count."""
    classes: list[str | None] = field(default_factory=list)
    """The name of each image's class; None where it is unknown. Another set may number the same names differently."""

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self) -> str:
        """A digest of the pixels."""
        return digest([list(self.pixels.shape), self.pixels])[:32]

    def to_pil(self, i: int) -> Image.Image:
        """Image i."""
        return Image.fromarray(self.pixels[i].permute(1, 2, 0).contiguous().numpy())


def open_images(source: str | Path, *, size: tuple[int, int] | None = None, limit: int | None = None) -> ImageSet:
    """Open a set of images.

    Args:
        source: A folder, an ``.npz`` archive, or a data set and its split as ``mnist5k:train``. In a folder, images
            that `gspn class-conditional sample` wrote know their class, and of others a subfolder is the class. An
            archive has ``arr_0`` uint8 ``[N, H, W, 3]`` and perhaps ``arr_1`` with labels.
        size: Height and width to resize to: the shorter side resized, the middle cut out. By default all images need
            the size of the first.
        limit: At most so many, evenly spread.

    Raises:
        UsageError: There are no images, or they differ in size and ``size`` is None.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz" and path.is_file():
        images = _from_archive(path, size, limit)
    elif path.is_dir():
        images = _from_folder(path, size, limit)
    elif ":" in str(source) and not path.exists():
        images = _from_data_set(str(source), size, limit)
    else:
        raise UsageError(
            f"{str(source)!r} is not a folder, not an .npz file, and not a data set with its split, as mnist5k:train."
        )
    if not len(images):
        unread = f"; {len(images.broken):,} could not be read: {printable(images.broken[0])}" if images.broken else ""
        raise UsageError(f"{str(source)!r} has no images{unread}.")
    return images


def export_npz(images: ImageSet, path: Path) -> None:
    """Write an ``.npz`` as the ADM suite reads it: ``arr_0`` uint8 ``[N, H, W, 3]``, ``arr_1`` labels where known."""
    arrays: dict[str, Any] = {"arr_0": images.pixels.permute(0, 2, 3, 1).contiguous().numpy()}
    if all(label >= 0 for label in images.labels):
        arrays["arr_1"] = np.asarray(images.labels, dtype=np.int64)
    with replaced(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def read_images(
    name: str,
    items: Iterable[tuple[str, Any]],
    read: Callable[[Any], tuple[Image.Image, Any] | tuple[Image.Image, Any, str | None]],
    size: tuple[int, int] | None = None,
) -> tuple[ImageSet, list[Any]]:
    """A set of images in memory, and the items that could be read.

    ``items`` are names of images and what ``read`` takes, which returns a PIL image, its label (-1: unknown) and
    perhaps the name of its class.

    Raises:
        UsageError: Images differ in size and ``size`` is None.
    """
    data = require("gspn.data")
    tensors: list[Tensor] = []
    labels, names, classes, broken, kept = [], [], [], [], []
    for own, item in items:
        try:
            image, label, *label_name = read(item)
            image = data.to_rgb(image, name=own)
        except data.CorruptImageError as error:
            broken.append(f"{own}: {error.reason}")
            continue
        except OSError as error:
            broken.append(f"{own}: {error.strerror or error}")
            continue
        height, width = size or (tuple(tensors[0].shape[1:]) if tensors else (image.height, image.width))
        if (image.height, image.width) != (height, width):
            if size is None:
                raise UsageError(
                    f"{name}: {own} is {image.height} x {image.width} and others are {height} x {width}; all images of "
                    "a set have one size."
                )
            image = _resized(data.trimmed(image, width, height), height, width)
        tensors.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels.append(int(label))
        names.append(own)
        classes.append(label_name[0] if label_name else None)
        kept.append(item)
    pixels = torch.stack(tensors) if tensors else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return ImageSet(name, pixels, labels, names, broken, classes), kept


def _from_archive(path: Path, size: tuple[int, int] | None, limit: int | None) -> ImageSet:
    pixels, labels = read_npz(path, "arr_0", "arr_1")
    if pixels is None:
        raise UsageError(f"{printable(path)} has no arr_0; it has to be uint8 [N, H, W, 3].")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise UsageError(
            f"{str(path)!r}: arr_0 is {pixels.dtype} {list(pixels.shape)}; it has to be uint8 [N, H, W, 3]."
        )
    if labels is not None and (labels.shape != pixels.shape[:1] or not np.can_cast(labels.dtype, np.int64)):
        raise UsageError(
            f"{str(path)!r}: arr_1 is {labels.dtype} {list(labels.shape)}; it has to be int64 [{len(pixels)}]."
        )

    def read(i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(pixels[i]), -1 if labels is None else int(labels[i])

    return read_images(path.name, [(f"{path.name}[{i}]", i) for i in _spread(len(pixels), limit)], read, size)[0]


def _from_folder(path: Path, size: tuple[int, int] | None, limit: int | None) -> ImageSet:
    data = require("gspn.data")
    paths, left_out = data.image_files(path)
    grids = {file for file in paths if Path(file).name == "grid.png"}
    files = [file for file in paths if file not in grids]
    left_out.add(_GRID, *sorted(grids))
    if left_out:
        warnings.warn(
            f"{printable(path)}: {left_out}", data.LeftOutWarning, stacklevel=2
        )  # of one place, so it is said once
    folders = {name: i for i, name in enumerate(data.natural_order({data.class_of(file) for file in files} - {""}))}

    def read(file: str) -> tuple[Image.Image, int, str | None]:
        image, name = data.load_image(path / file, name=file), data.class_of(file) or None
        record = read_record(path / file) if file.lower().endswith(".png") else {}
        label, label_name = record.get("label"), record.get("class_name")
        if not isinstance(label, int) or isinstance(label, bool):
            return image, -1 if name is None else folders[name], name
        # Where a model does not name its classes, the record has the number as the name.
        named = isinstance(label_name, str) and label_name != str(label)
        return image, label, label_name if named else None

    chosen = [files[i] for i in _spread(len(files), limit)]
    return read_images(path.name, [(file, file) for file in chosen], read, size)[0]


def _from_data_set(source: str, size: tuple[int, int] | None, limit: int | None) -> ImageSet:
    name, _, split = source.rpartition(":")
    images = open_data(name, split)
    images.transform = None
    names = getattr(images, "classes", None) or []

    def read(i: int) -> tuple[Image.Image, int, str | None]:
        image, label = images[i]
        return image, label, names[label] if 0 <= label < len(names) else None

    items = [(f"{source}[{i}]", i) for i in _spread(len(images), limit)]
    return read_images(source, items, read, size)[0]


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    tall, wide = max(round(image.height * scale), height), max(round(image.width * scale), width)
    image = image.resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = (wide - width) // 2, (tall - height) // 2
    return image.crop((left, top, left + width, top + height))


def _spread(count: int, limit: int | None) -> Sequence[int]:
    if limit is None or limit >= count:
        return range(count)
    return [i * count // limit for i in range(limit)]
