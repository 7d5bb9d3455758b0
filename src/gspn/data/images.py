"""Decoding of unchecked image files."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# PIL warns of a decompression bomb from this size on, and refuses images of twice as many pixels.
MAX_PIXELS = 89_478_485
"""The default limit of pixels in an image."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that are decoded. PIL knows others, which may start other programs (EPS) or hold no image."""

_WITH_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}


class CorruptImageError(ValueError):
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
        return f"{self.name}: {self.reason}"


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
        OSError: the file cannot be opened or read.

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
        with open(file, "rb") as opened:  # noqa: PTH123  (os.PathLike is wider than Path)
            return load_image(opened, max_pixels=max_pixels, name=name or os.fspath(file))
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
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise CorruptImageError(name, f"cannot be decoded, damaged or truncated ({error})") from error
    return _rgb(_upright(image), name)


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
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the operating system, not from a decoder
            raise
        raise CorruptImageError(name, f"has a damaged header ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
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
        colour = image.convert("RGBA")
        white = Image.new("RGBA", colour.size, "white")
        white.alpha_composite(colour)
        return white.convert("RGB")
    return image.convert("RGB")
