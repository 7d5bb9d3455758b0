"""Decoding of unchecked files of maps."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..._errors import UsageError
from ..._files import open_regular, printable, short
from ..images import MAX_PIXELS, CorruptImageError, upright
from .base import Map, MapClasses

# JPEG changes values, and programs that write a GIF may renumber its colours.
_FORMATS = {"PNG": (".png",), "TIFF": (".tif", ".tiff"), "BMP": (".bmp",), "PPM": (".pgm",)}
EXTENSIONS = frozenset((".npy", *(extension for one in _FORMATS.values() for extension in one)))
"""How the names of files of maps end, in lower case."""
_MODES = ("1", "L", "P", "I", "F")
_MOST_BYTES = 1 << 32
_MOST_EXACT = 1 << 24  # of whole numbers in float32
_MOST_NUMBER = 1e30  # its square is a number in float64, and it is one in float32
# How decoders name samples that they do not return as they are: 2 and 4 bits are spread to 8, and others are inverted.
_CHANGED = re.compile("[1L];.*[24I].*")


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
        if not (_is_number(self.scale) and 0 < abs(self.scale) <= _MOST_NUMBER):
            raise UsageError(f"scale={short(self.scale)} is not a factor; give a number other than 0.")
        if type(self.first) is not int or not 0 <= self.first < _MOST_EXACT:
            raise UsageError(f"first={short(self.first)} is not the value of a class; give a whole number from 0 on.")
        # An infinity may be what is ignored, and an integer beyond float64 is none of the values.
        if self.ignore is not None and not (
            _is_number(self.ignore) and (isinstance(self.ignore, float) or abs(self.ignore) <= _MOST_NUMBER)
        ):
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
            wrong = ~ignored & ~(np.abs(numbers) < _MOST_NUMBER)
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
    decoded, and no pickle is read. Images whose values decoders change (grey of 2 or 4 bits, white as zero, a PGM whose
    largest value is not 255 or 65535) are refused. The EXIF orientation is applied, as to images.

    Raises:
        CorruptImageError: the file has another format, is damaged, too large, or has values out of range.
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_npy(file: IO[bytes], max_pixels: int, name: str) -> NDArray[Any]:
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, order, kind = read[np.lib.format.read_magic(file)](file, max_header_size=4096)
    except (
        Exception
    ) as error:  # numpy parses a header as Python: ValueError, TypeError, TokenError, RecursionError, ...
        raise _damaged_header(error, name) from None
    if len(shape) != 2 or any(type(side) is not int for side in shape) or kind.kind not in "buif":
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
        raise _damaged_header(error, name) from error
    _check_pixels(image.width, image.height, max_pixels, name)
    mode = image.mode
    if mode not in _MODES and not mode.startswith("I;16"):
        raise CorruptImageError(
            name, f"has the channels {mode}; a map has one, whose values are classes or numbers. Convert it"
        )
    samples = _check_samples(image, file, name)
    try:
        values = np.asarray(upright(image))
    except Exception as error:  # decoders raise OSError, SyntaxError, RuntimeError, struct.error, zlib.error, ...
        raise CorruptImageError(name, f"cannot be decoded, damaged or truncated ({printable(error)[:200]})") from error
    # PIL has no unsigned integers of 32 bits, and returns the bits of them as signed ones.
    return values.view(np.uint32) if samples.startswith("I;32") and not samples.endswith("S") else values


def _check_samples(image: Image.Image, file: IO[bytes], name: str) -> str:
    """How the decoder names the samples of an image, if it returns them as they are in the file.

    Raises:
        CorruptImageError: it scales or inverts them, or misreads them.
    """
    tiles: Any = getattr(image, "tile", None)  # of images from files
    codec, _, _, arguments = tiles[0] if tiles else ("", None, 0, "")
    samples = str(arguments if isinstance(arguments, str) else arguments[0])
    if codec.startswith("ppm") and samples != "1;I" and arguments[1] not in (255, 65535):
        raise CorruptImageError(
            name, f"is a PGM with the largest value {arguments[1]}, to which decoders scale; write it with 255 or 65535"
        )
    if _CHANGED.fullmatch(samples):
        raise CorruptImageError(
            name, f"has samples ({samples}) that decoders scale or invert; save it in 8 bits, black as zero"
        )
    if image.format == "BMP" and image.mode in ("1", "L"):
        # PIL takes any palette of grey in order for one sample a bit or a byte.
        position = file.tell()
        file.seek(28)
        bits = int.from_bytes(file.read(2), "little")
        file.seek(position)
        if bits != (1 if image.mode == "1" else 8):
            raise CorruptImageError(name, f"is a grey BMP of {bits} bits, which PIL misreads; save it as PNG")
    return samples


def _damaged_header(error: Exception, name: str) -> Exception:
    """The error of a reader; that of the operating system as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return CorruptImageError(name, f"has a damaged header ({printable(error)[:200]})")


def _check_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    if width < 1 or height < 1:
        raise CorruptImageError(name, f"{width} x {height} has no pixels")
    if width * height > max_pixels:
        raise CorruptImageError(
            name, f"{width} x {height} = {width * height:,} pixels are more than {max_pixels=:,}. If it is sound, pass "
            "a larger max_pixels.",
        )  # fmt: skip
