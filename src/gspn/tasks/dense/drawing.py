"""Maps as images: colours, overlays, legends, and rows of images for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..._files import printable
from .model import Target

_INK, _PAPER, _UNKNOWN = (34, 39, 46), (255, 255, 255), (229, 231, 235)
# From dark to light and from blue to yellow, so that it is read without colours too.
_RAMP = np.array(
    [(24, 32, 92), (32, 84, 140), (36, 134, 142), (72, 176, 110), (176, 206, 70), (250, 232, 98), (255, 250, 220)],
    np.float32,
)


def value_range(target: Target) -> tuple[float, float]:
    """The numbers that the two ends of the colours stand for: two deviations around the mean of the training."""
    return target.mean - 2 * target.std, target.mean + 2 * target.std


def colour_map(values: NDArray, target: Target) -> Image.Image:
    """A map ``[H, W]`` in the colours of its classes, or of its numbers; what is ignored is grey.

    Args:
        values: Classes or numbers; NaN where they are ignored.
        target: Their meaning.
    """
    ignored = np.isnan(values)
    if target.classes:
        table = np.array([*target.colours, _UNKNOWN], np.uint8)
        return Image.fromarray(table[np.where(ignored, len(target.classes), np.nan_to_num(values)).astype(np.int64)])
    low, high = value_range(target)
    place = np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0, 1) * (len(_RAMP) - 1)
    below = np.minimum(place.astype(np.int64), len(_RAMP) - 2)
    part = (place - below)[..., None].astype(np.float32)
    pixels = np.rint(_RAMP[below] * (1 - part) + _RAMP[below + 1] * part).astype(np.uint8)
    pixels[ignored] = _UNKNOWN
    return Image.fromarray(pixels)


def overlay(image: Image.Image, values: NDArray, target: Target, alpha: float = 0.55) -> Image.Image:
    """The image with the colours of a map laid over it; what is ignored stays the image."""
    coloured = Image.blend(image, colour_map(values, target), alpha)
    known = Image.fromarray((~np.isnan(values)).astype(np.uint8) * 255)
    return Image.composite(coloured, image, known)


def legend(target: Target, width: int = 300) -> Image.Image:
    """The names of the classes beside their colours, or the scale of the numbers."""
    font, line = _font(15), 24
    if target.classes:
        columns = 1 if len(target.classes) <= 24 else 3
        rows = -(-len(target.classes) // columns)
        image = Image.new("RGB", (columns * width, rows * line + 16), _PAPER)
        draw = ImageDraw.Draw(image)
        for i, (name, colour) in enumerate(zip(target.classes, target.colours, strict=True)):
            x, y = (i // rows) * width + 10, (i % rows) * line + 8
            draw.rectangle((x, y + 3, x + 26, y + line - 5), fill=tuple(colour), outline=_INK)
            draw.text((x + 36, y + 2), printable(name)[:34], fill=_INK, font=font)
        return image
    low, high = value_range(target)
    image = Image.new("RGB", (width, 64), _PAPER)
    ramp = np.tile(np.linspace(low, high, width - 20, dtype=np.float32), (20, 1))
    image.paste(colour_map(ramp, target), (10, 10))
    draw = ImageDraw.Draw(image)
    for x, value, anchor in ((10, low, "la"), (width // 2, target.mean, "ma"), (width - 10, high, "ra")):
        draw.text((x, 36), f"{value:.4g} {printable(target.unit)}", fill=_INK, font=font, anchor=anchor)
    return image


def side_by_side(images: Sequence[Image.Image], titles: Sequence[str], height: int = 480) -> Image.Image:
    """Images of one size in a row, with a title above each, at most so high."""
    scale = min(1.0, height / images[0].height)
    size = max(1, round(images[0].width * scale)), max(1, round(images[0].height * scale))
    gap, head = 8, 26
    row = Image.new("RGB", (len(images) * (size[0] + gap) + gap, size[1] + head + gap), _PAPER)
    draw = ImageDraw.Draw(row)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        left = gap + i * (size[0] + gap)
        row.paste(image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST), (left, head))
        draw.text((left, 5), title, fill=_INK, font=_font(14))
    return row


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
