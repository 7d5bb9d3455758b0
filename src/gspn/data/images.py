"""Decoding of unchecked image files."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from .._errors import UsageError
from .._files import open_regular, printable

# PIL warns of a decompression bomb from this size on, and refuses images of twice as many pixels.
MAX_PIXELS = 89_478_485
"""The default limit of pixels in an image."""

_MOST_BYTES = 1 << 30  # of a file; some decoders read all of it before they look at it

_EXTENSIONS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif", ".avifs"),
}
_NEEDS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}


def _opens(form: str) -> bool:
    """Whether this Pillow was built with the decoder."""
    feature = _NEEDS.get(form)
    return feature is None or (feature in {*features.modules, *features.codecs} and bool(features.check(feature)))


FORMATS = tuple(form for form in _EXTENSIONS if _opens(form))
"""The formats that are decoded: those of this list that the installed Pillow opens. PIL knows others, which may start
other programs (EPS) or hold no image."""

EXTENSIONS = frozenset(extension for form in FORMATS for extension in _EXTENSIONS[form])
"""How the names of image files end, in lower case; the same everywhere in this package."""

_WITH_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}
_MOST_STRETCHED = 16


class CorruptImageError(UsageError):
    """An image that cannot or must not be decoded.

    Attributes:
        name: the name of the file, if known.
        reason: what is wrong with it, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both in args, so that the error can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


def load_image(
    file: str | os.PathLike[str] | IO[bytes], *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Open and decode an image as 8-bit RGB.

    Format and size are checked in the header before anything is decoded. The pixels are decoded here rather than when
    they are first used, so that the error of a truncated file has its name. The EXIF orientation of cameras is applied,
    transparency is put on white, and 16-bit grey is rounded to its upper 8 bits.

    Args:
        file: a path, or a file that is open for reading bytes, which stays open.
        max_pixels: the limit of width times height. PIL's own limit, ``2 * PIL.Image.MAX_IMAGE_PIXELS``, also applies.
        name: the name of the file in errors; None for its path.

    Returns:
        The image in mode RGB, the first frame of an animation.

    Raises:
        CorruptImageError: the file is not an image of a known format, is damaged or truncated, has more than
            ``max_pixels``, or has a mode without a defined range.
        OSError: the file cannot be opened or read, or is a pipe, a socket or a device, which is never read.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from gspn.data import load_image
        >>> file = io.BytesIO()
        >>> Image.new("LA", (4, 2), (0, 0)).save(file, "PNG")
        >>> image = load_image(file)
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (4, 2), (255, 255, 255))
    """
    if isinstance(file, str | os.PathLike):
        with open_regular(file) as opened:
            name, size = name or os.fspath(file), os.fstat(opened.fileno()).st_size
            if size > _MOST_BYTES:
                raise CorruptImageError(name, f"has {size:,} bytes, more than the {_MOST_BYTES:,} an image may have")
            return load_image(opened, max_pixels=max_pixels, name=name)
    if name is None:
        name = str(getattr(file, "name", None) or "image without a name")
    image = _open(file, name)
    width, height = image.size
    if width * height > max_pixels:
        raise CorruptImageError(
            name,
            f"{width} x {height} = {width * height:,} pixels are more than {max_pixels=:,}. "
            "A small file of so many pixels may be an attack on the memory; if it is not, pass a larger max_pixels.",
        )
    return to_rgb(image, name=name)


def to_rgb(image: Image.Image, *, name: str = "the image") -> Image.Image:
    """The first frame of a PIL image as 8-bit RGB, by the rules of :func:`load_image`; decoded if it is not yet.

    Raises:
        CorruptImageError: it cannot be decoded, or has a mode without a defined range; ``name`` names it.

    Example:
        >>> from PIL import Image
        >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    try:
        image.load()
        if not (image.width and image.height):
            raise CorruptImageError(name, f"{image.width} x {image.height} has no pixels")
        return _rgb(upright(image), name)
    except CorruptImageError:
        raise
    except MemoryError as error:
        raise CorruptImageError(name, f"needs more memory than there is ({image.width} x {image.height})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, RuntimeError, struct.error, zlib.error, ...
        raise CorruptImageError(name, f"cannot be decoded, damaged or truncated ({error})") from error


def row_folders(local: Path | None, cache: str | None) -> list[Path]:
    """The folders in which a row of ``datasets`` may name an image: that of the data, or the caches of the hub."""
    if local is not None:
        return [local]
    datasets, hub = importlib.import_module("datasets.config"), importlib.import_module("huggingface_hub.constants")
    return [Path(cache or datasets.HF_DATASETS_CACHE), Path(hub.HF_HUB_CACHE)]


def row_image(value: Any, folders: Sequence[Path], *, max_pixels: int = MAX_PIXELS, name: str) -> Image.Image:
    """The image of a row of ``datasets``, as :func:`load_image` opens it.

    Raises:
        CorruptImageError: the row holds no image, or it cannot be decoded.
    """
    return load_image(row_file(value, folders, name=name), max_pixels=max_pixels, name=name)


def row_file(value: Any, folders: Sequence[Path], *, name: str) -> Path | IO[bytes]:
    """The file that a row of ``datasets`` holds: its bytes, or the path of a file of one of ``folders``.

    A path is a part of the data, which nobody has checked, so no other file is read.

    Raises:
        CorruptImageError: the row holds no image.
    """
    value = value if isinstance(value, dict) else {"bytes": value}
    if value.get("bytes"):
        return io.BytesIO(value["bytes"])
    if not value.get("path"):
        raise CorruptImageError(name, "the row holds no image")
    path = Path(value["path"]).resolve()
    if not (path.is_file() and any(path.is_relative_to(folder.resolve()) for folder in folders)):
        raise CorruptImageError(name, f"the row holds no bytes, and {str(path)!r} is not a file of this data set")
    return path


def trimmed(image: Image.Image, width: int = 1, height: int = 1) -> Image.Image:
    """The middle of an image that is stretched more than 16 times as much as ``width`` x ``height``; else itself.

    What resizes the shorter side and crops would need gigabytes for an image of 1 x 60,000 pixels, so every transform
    begins with this.

    Example:
        >>> from PIL import Image
        >>> trimmed(Image.new("RGB", (3, 60_000))).size, trimmed(Image.new("RGB", (30, 60))).size
        ((3, 48), (30, 60))
    """
    wide = min(image.width, max(1, _MOST_STRETCHED * image.height * width // height))
    tall = min(image.height, max(1, _MOST_STRETCHED * image.width * height // width))
    if (wide, tall) == image.size:
        return image
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    return image.crop((left, top, left + wide, top + tall))


def _open(file: IO[bytes], name: str) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # PIL raises this before the size is known here; its message states the size.
        raise CorruptImageError(
            name, f"{error} If the file is sound, raise PIL.Image.MAX_IMAGE_PIXELS and pass a larger max_pixels."
        ) from error
    except UnidentifiedImageError as error:
        raise CorruptImageError(name, f"is not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the operating system, not from a decoder
            raise
        raise CorruptImageError(name, f"has a damaged header ({error})") from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
    except Exception:  # an image with damaged EXIF has no orientation
        return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise CorruptImageError(
                name, f"grey values from {grey.min()} to {grey.max()} are beyond 16 bits; save it as 8 or 16 bits"
            )
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise CorruptImageError(name, "floating-point values have no defined range; save it as 8 or 16 bits")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        colour = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", colour.size, "white")
        white.alpha_composite(colour)
        return white.convert("RGB")
    if image.mode == "LAB":
        raise CorruptImageError(name, "colours in LAB are not converted; save it as RGB")
    return image.convert("RGB")
