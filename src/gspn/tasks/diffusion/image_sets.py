"""Sets of images to be compared: folders, ``.npz`` archives of the ADM suite, data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..._files import replaced
from ..class_conditional.sampling import METADATA
from ..core.errors import UsageError, require
from ..core.loaders import open_data

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class ImageSet:
    """Images of one size, in memory as bytes.

    Attributes:
        name: Of the set.
        pixels: ``[N, 3, H, W]``, uint8.
        labels: The class that each image was asked for or has; -1 where nobody says.
        names: Of the images.
        broken: What could not be read and does not count.
    """

    name: str
    pixels: Tensor
    labels: list[int]
    names: list[str]
    broken: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self) -> str:
        """A hash of the pixels."""
        shape = "x".join(map(str, self.pixels.shape))
        return hashlib.blake2b(self.pixels.numpy().tobytes(), key=shape.encode()[:64], digest_size=16).hexdigest()


def open_images(source: str | Path, *, size: tuple[int, int] | None = None, limit: int | None = None) -> ImageSet:
    """Open a set of images.

    Args:
        source: A folder of images (those of ``gspn class-conditional sample`` know their class; else a subfolder may say it), an
            ``.npz`` with ``arr_0`` uint8 ``[N, H, W, 3]`` and perhaps ``arr_1`` labels, or a data set and its split as
            ``mnist5k:train``.
        size: Height and width to bring images to: the shorter side resized, the middle cut out. By default the first
            image's, which all others have to have.
        limit: At most so many, evenly spread.

    Raises:
        UsageError: there is nothing there, or images differ in size and none was given.
    """
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        found = _from_archive(path, size, limit)
    elif path.is_dir():
        found = _from_folder(path, size, limit)
    elif ":" in str(source) and not path.exists():
        found = _from_data_set(str(source), size, limit)
    else:
        raise UsageError(
            f"{str(source)!r} is neither a folder nor an .npz file nor a data set with its split, as mnist5k:train."
        )
    if not len(found):
        raise UsageError(f"{str(source)!r} has no images.")
    return found


def export_npz(images: ImageSet, path: Path) -> None:
    """Write an ``.npz`` as the ADM suite reads it: ``arr_0`` uint8 ``[N, H, W, 3]``, ``arr_1`` labels where known."""
    arrays: dict[str, Any] = {"arr_0": images.pixels.permute(0, 2, 3, 1).contiguous().numpy()}
    if all(label >= 0 for label in images.labels):
        arrays["arr_1"] = np.asarray(images.labels, dtype=np.int64)
    with replaced(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def _from_archive(path: Path, size: tuple[int, int] | None, limit: int | None) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            pixels, labels = archive["arr_0"], archive.get("arr_1")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as an .npz with arr_0: {error}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise UsageError(
            f"{str(path)!r}: arr_0 is {pixels.dtype} {list(pixels.shape)}; it has to be uint8 [N, H, W, 3]."
        )
    if labels is not None and labels.shape != pixels.shape[:1]:
        raise UsageError(f"{str(path)!r}: arr_1 is {list(labels.shape)}; it has to be [{len(pixels)}].")
    chosen = _spread(len(pixels), limit)
    images = [Image.fromarray(pixels[i]) for i in chosen]
    known = [-1] * len(chosen) if labels is None else [int(labels[i]) for i in chosen]
    return gathered(path.name, images, known, [f"{path.name}[{i}]" for i in chosen], size, [])


def _from_folder(path: Path, size: tuple[int, int] | None, limit: int | None) -> ImageSet:
    data = require("gspn.data")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.name != "grid.png")
    folders = sorted({file.parent.name for file in files if file.parent != path})
    images, labels, names, broken = [], [], [], []
    for file in (files[i] for i in _spread(len(files), limit)):
        name = str(file.relative_to(path))
        try:
            images.append(data.load_image(file))
        except (data.BrokenImageError, OSError) as error:
            broken.append(f"{name}: {error}")
            continue
        names.append(name)
        label = _label_of(file)
        labels.append(folders.index(file.parent.name) if label is None and file.parent != path else label)
    return gathered(path.name, images, [-1 if one is None else one for one in labels], names, size, broken)


def _label_of(file: Path) -> int | None:
    """The class that a generated image says it was asked for."""
    if file.suffix.lower() != ".png":
        return None
    with Image.open(file) as image:
        text = getattr(image, "text", {}).get(METADATA)
    try:
        label = json.loads(text)["label"] if text else None
    except (ValueError, KeyError, TypeError):
        return None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _from_data_set(source: str, size: tuple[int, int] | None, limit: int | None) -> ImageSet:
    name, _, split = source.rpartition(":")
    data = require("gspn.data")
    dataset = open_data(name, split)
    dataset.transform = None
    images, labels, names, broken = [], [], [], []
    for i in _spread(len(dataset), limit):
        try:
            image, label = dataset[i]
        except (data.BrokenImageError, OSError) as error:
            broken.append(str(error))
            continue
        images.append(image.convert("RGB"))
        labels.append(int(label))
        names.append(f"{source}[{i}]")
    return gathered(source, images, labels, names, size, broken)


def gathered(
    name: str,
    images: Sequence[Image.Image],
    labels: list[int],
    names: list[str],
    size: tuple[int, int] | None,
    broken: list[str],
) -> ImageSet:
    """A set of images in memory, brought to ``size`` where one is given; else all have to have the first one's."""
    if not images:
        return ImageSet(name, torch.empty(0, 3, 1, 1, dtype=torch.uint8), [], [], broken)
    wanted = size or (images[0].height, images[0].width)
    tensors = []
    for image, own in zip(images, names, strict=True):
        if (image.height, image.width) != wanted:
            if size is None:
                raise UsageError(
                    f"{name}: {own} is {image.height} x {image.width} and others are {wanted[0]} x {wanted[1]}; all "
                    "images of a set have one size."
                )
            image = _cut(image, *wanted)
        tensors.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return ImageSet(name, torch.stack(tensors), labels, names, broken)


def _cut(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    tall, wide = max(round(image.height * scale), height), max(round(image.width * scale), width)
    image = image.resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = (wide - width) // 2, (tall - height) // 2
    return image.crop((left, top, left + width, top + height))


def _spread(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]
