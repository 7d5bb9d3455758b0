"""Grids of images with names and captions, as one image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..._files import printable

_GAP, _LINE = 8, 13
_INK, _MUTED = (31, 31, 51), (110, 112, 130)


def draw_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    names: Sequence[str] = (),
    titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    smallest: int = 48,
    smooth: bool = False,
) -> Image.Image:
    """Draw rows of images of one size.

    Args:
        rows: The images of each row.
        names: Of the rows, written at the left.
        titles: Of the columns, written above the first row in at most three lines.
        captions: Of the images of each row, written below them.
        smallest: Images are enlarged by a whole factor until a side has so many pixels.
        smooth: Interpolate enlarged images instead of showing their pixels.

    Example:
        >>> image = Image.new("RGB", (64, 64))
        >>> draw_grid([[image, image]], titles=["a red square", "a blue one"]).width
        152
    """
    names, titles = [printable(name) for name in names], [printable(title) for title in titles]
    captions = [[printable(caption) for caption in row] for row in captions]
    width, height = rows[0][0].size
    scale = max(1, math.ceil(smallest / max(width, height)))
    width, height = width * scale, height * scale
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_wrapped(pen, title, width) for title in titles]
    margin = _GAP + (max(int(pen.textlength(name)) for name in names) + _GAP if names else 0)
    head = _GAP + (_LINE * max(len(text) for text in texts) + _GAP // 2 if texts else 0)
    step = height + _GAP + (_LINE if captions else 0)
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (margin + columns * (width + _GAP), head + len(rows) * step), "white")
    pen = ImageDraw.Draw(grid)
    for column, text in enumerate(texts):
        for number, line in enumerate(reversed(text), start=1):
            pen.text((margin + column * (width + _GAP), head - _GAP // 2 - number * _LINE), line, fill=_INK)
    for number, row in enumerate(rows):
        top = head + number * step
        if names:
            pen.text((_GAP, top + height // 2), names[number], fill=_MUTED, anchor="lm")
        for column, image in enumerate(row):
            left = margin + column * (width + _GAP)
            resampling = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
            grid.paste(image.convert("RGB").resize((width, height), resampling), (left, top))
            if captions:
                pen.text((left, top + height), captions[number][column], fill=_MUTED)
    return grid


def draw_prompts(rows: dict[str, list[Image.Image]], prompts: Sequence[str], *, columns: int = 8) -> Image.Image:
    """Draw, below each prompt, the image that each of the named rows has of it; all images have one size."""
    columns = min(columns, len(prompts))
    names = list(rows) if len(rows) > 1 else []
    bands = [
        draw_grid(
            [images[begin : begin + columns] for images in rows.values()],
            names=names,
            titles=prompts[begin : begin + columns],
            smallest=96,
            smooth=True,
        )
        for begin in range(0, len(prompts), columns)
    ]
    tops = list(itertools.accumulate((band.height for band in bands), initial=0))
    sheet = Image.new("RGB", (bands[0].width, tops[-1]), "white")
    for band, top in zip(bands, tops, strict=False):
        sheet.paste(band, (0, top))
    return sheet


def _wrapped(pen: ImageDraw.ImageDraw, text: str, width: int, most: int = 3) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return lines
