"""Decoding of unchecked files of maps."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..._errors import UsageError
from ..._files import open_regular, printable, short
from ..images import MAX_PIXELS, CorruptImageError
from .base import Map, MapClasses

# JPEG changes values, and programs that write a GIF may renumber its colours.
_FORMATS = {"PNG": (".png",), "TIFF": (".tif", ".tiff"), "BMP": (".bmp",), "PPM": (".pgm",)}
EXTENSIONS = frozenset((".npy", *(extension for one in _FORMATS.values() for extension in one)))
"""How the names of files of maps end, in lower case."""
_MODES = ("1", "L", "P", "I", "F")
_MOST_BYTES = 1 << 32
_MOST_EXACT = 1 << 24  # of whole numbers in float32


@dataclass(frozen=True)
class MapRule:
    """How the values in a file become classes or numbers.

    Raises:
        UsageError: a value out of range.
    """

    classes: MapClasses | None
    """The classes that values are indices of; None for numbers."""
    ignore: float | None = None
    """The value that is ignored; besides it NaN is."""
    first: int = 0
    """The value of the first class; smaller ones are ignored."""
    scale: float = 1.0
    """The factor from values in the file to numbers."""

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale) and self.scale):
            raise UsageError(f"scale={short(self.scale)} is not a factor; give a number other than 0.")
        if not isinstance(self.first, int) or not 0 <= self.first < _MOST_EXACT:
            raise UsageError(f"first={short(self.first)} is not the value of a class; give a whole number from 0 on.")
        if self.ignore is not None and not isinstance(self.ignore, int | float):
            raise UsageError(f"ignore={short(self.ignore)} is not a value; give a number, or null for none.")

    def apply(self, values: NDArray[Any], name: str) -> Map:
        """The map of the values in a file.

        Raises:
            CorruptImageError: a value that is the index of no class, or too large; ``name`` names the file.
        """
        ignored = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        if self.ignore is not None:
            ignored |= values == self.ignore
        if self.classes is None:
            numbers = np.where(ignored, np.nan, values.astype(np.float64) * self.scale)
            wrong = ~ignored & ~(np.abs(numbers) < 1e30)
            rule = "is not a finite number"
        else:
            count = len(self.classes.names)
            ignored |= values < self.first
            numbers = np.where(ignored, np.nan, values.astype(np.float64) - self.first)
            wrong = ~ignored & ~((numbers < count) & (numbers == np.floor(numbers)))
            last = self.first + count - 1
            rule = f"is none of the {count} classes, {self.first} to {last}" + (
                "" if self.ignore is None else f", and not the ignored {self.ignore:g}"
            )
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            value = values[row, column].item()
            raise CorruptImageError(name, f"the map's value {value:g} in row {row}, column {column} {rule}")
        return numbers.astype(np.float32)


def load_map(
    file: str | os.PathLike[str] | IO[bytes], rule: MapRule, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Map:
    """Open and decode a map.

    It is an image of one channel without loss (PNG, TIFF, BMP, PGM; 1, 8, 16 or 32 bits, floating point, or the
    indices of a palette), or an array ``[H, W]`` of numbers in a ``.npy``. Size and type are checked before anything is
    decoded, and no pickle is read.

    Raises:
        CorruptImageError: the file is no such map, is damaged, too large, or has values out of range.
        OSError: the file cannot be opened or read, or is a pipe, a socket or a device.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(file, "PNG")
        >>> load_map(file, MapRule(MapClasses(("water", "land")), ignore=255)).tolist()
        [[0.0, 1.0, nan]]
    """
    if isinstance(file, str | os.PathLike):
        with open_regular(file) as opened:
            name, size = name or os.fspath(file), os.fstat(opened.fileno()).st_size
            if size > _MOST_BYTES:
                raise CorruptImageError(name, f"has {size:,} bytes, more than the {_MOST_BYTES:,} a map may have")
            return load_map(opened, rule, max_pixels=max_pixels, name=name)
    name = name or str(getattr(file, "name", None) or "map without a name")
    file.seek(0)
    numpy_file = file.read(6) == b"\x93NUMPY"
    file.seek(0)
    return rule.apply((_read_npy if numpy_file else _read_image)(file, max_pixels, name), name)


def _read_npy(file: IO[bytes], max_pixels: int, name: str) -> NDArray[Any]:
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, order, kind = read[np.lib.format.read_magic(file)](file, max_header_size=4096)
    except (ValueError, KeyError, EOFError) as error:
        raise CorruptImageError(name, f"has a damaged header ({printable(error)[:200]})") from None
    if len(shape) != 2 or kind.kind not in "buif":
        raise CorruptImageError(name, f"is an array of {list(shape)} {kind}; a map is [height, width] of numbers")
    _check_pixels(shape[1], shape[0], max_pixels, name)
    data = file.read(shape[0] * shape[1] * kind.itemsize)
    if len(data) < shape[0] * shape[1] * kind.itemsize:
        raise CorruptImageError(name, "is truncated")
    return np.frombuffer(data, kind).reshape(shape, order="F" if order else "C")


def _read_image(file: IO[bytes], max_pixels: int, name: str) -> NDArray[Any]:
    try:
        image = Image.open(file, formats=list(_FORMATS))
    except UnidentifiedImageError:
        known = ", ".join((*_FORMATS, "npy"))
        raise CorruptImageError(name, f"is not a map of a known format without loss ({known})") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptImageError(name, f"has a damaged header ({printable(error)[:200]})") from error
    _check_pixels(image.width, image.height, max_pixels, name)
    mode = image.mode
    if mode not in _MODES and not mode.startswith("I;16"):
        raise CorruptImageError(
            name, f"has the channels {mode}; a map has one, whose values are classes or numbers. Convert it"
        )
    try:
        return np.asarray(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, RuntimeError, struct.error, zlib.error, ...
        raise CorruptImageError(name, f"cannot be decoded, damaged or truncated ({printable(error)[:200]})") from error


def _check_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    if not width or not height:
        raise CorruptImageError(name, f"{width} x {height} has no pixels")
    if width * height > max_pixels:
        raise CorruptImageError(
            name, f"{width} x {height} = {width * height:,} pixels are more than {max_pixels=:,}. If it is sound, pass "
            "a larger max_pixels.",
        )  # fmt: skip
