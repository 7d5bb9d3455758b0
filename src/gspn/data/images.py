"""Opening image files that nobody has checked."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Where PIL begins to warn of a decompression bomb, and where it refuses only at twice as many.
MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded unless the caller says otherwise."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that are decoded. PIL knows more, some of which start other programs (EPS) or hold no image."""

_WITH_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}


class BrokenImageError(ValueError):
    """An image that cannot or must not be decoded.

    Attributes:
        name: the file, as far as it is known.
        reason: what is wrong with it, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both in args, so that the error passes between processes
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def load_image(
    file: str | os.PathLike[str] | IO[bytes], *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Open and decode an image as 8-bit RGB.

    Format and size are checked from the header, before anything is decoded. The pixels are decoded here and not when
    they are first used, so that a truncated file is found where its name is known. The orientation that cameras write
    into EXIF is applied; transparency is put on white; 16-bit grey keeps its upper 8 bits, rounded.

    Args:
        file: a path, or a file open for reading bytes; such a file is left open.
        max_pixels: width times height beyond which the image is refused. PIL has a limit of its own,
            ``2 * PIL.Image.MAX_IMAGE_PIXELS``, which stays in force.
        name: what errors call the file; its path where None.

    Returns:
        The image, mode RGB. Of an animation, the first frame.

    Raises:
        BrokenImageError: a ``ValueError``: the file is no image of a known format, is damaged or truncated, has more
            than ``max_pixels``, or has a mode without a defined range.
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
        raise BrokenImageError(
            name,
            f"{width} x {height} = {width * height:,} pixels are more than {max_pixels=:,}. "
            "A small file of so many pixels may be made to exhaust the memory; pass a larger max_pixels if it is not.",
        )
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own: OSError, SyntaxError, struct.error, zlib.error, ...
        raise BrokenImageError(name, f"cannot be decoded, damaged or truncated ({error})") from error
    return _rgb(_upright(image), name)


def _open(file: IO[bytes], name: str) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # PIL raises before it hands out the size, which its message states.
        raise BrokenImageError(
            name, f"{error} If the file is sound, raise PIL.Image.MAX_IMAGE_PIXELS and pass a larger max_pixels."
        ) from error
    except UnidentifiedImageError as error:
        raise BrokenImageError(name, f"is no image of a known format ({', '.join(FORMATS)})") from error
    except OSError as error:
        if error.errno is not None:  # from the operating system, not from a decoder
            raise
        raise BrokenImageError(name, f"has a damaged header ({error})") from error
    except (SyntaxError, ValueError) as error:
        raise BrokenImageError(name, f"has a damaged header ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
    except Exception:  # an image with damaged EXIF is still an image, and has no orientation
        return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BrokenImageError(
                name, f"grey values from {grey.min()} to {grey.max()} are beyond 16 bits; save it as 8 or 16 bits"
            )
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BrokenImageError(name, "floating-point values have no defined range; save it as 8 or 16 bits")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        colour = image.convert("RGBA")
        white = Image.new("RGBA", colour.size, "white")
        white.alpha_composite(colour)
        return white.convert("RGB")
    return image.convert("RGB")
