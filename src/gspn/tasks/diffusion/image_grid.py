"""Images of the same prompts under each other, as one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw


def draw_sheet(rows: dict[str, list[Image.Image]], prompts: Sequence[str], *, columns: int = 8) -> Image.Image:
    """One image: under each prompt what each of the rows has of it.

    Args:
        rows: By name, an image for each prompt, all of one size.
        prompts: What the images are of.
        columns: Prompts beside each other.
    """
    width, height = next(iter(rows.values()))[0].size
    scale = max(1, math.ceil(96 / max(width, height)))
    width, height = width * scale, height * scale
    gap, line = 10, 13
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    named = len(rows) > 1
    margin = gap + (max(int(pen.textlength(name)) for name in rows) + gap if named else 0)
    texts = [_wrapped(pen, prompt, width) for prompt in prompts]
    columns = min(columns, len(prompts))
    head = line * max(len(text) for text in texts) + 4
    block = head + len(rows) * (height + 4) + gap
    bands = math.ceil(len(prompts) / columns)
    sheet = Image.new("RGB", (margin + columns * (width + gap), gap + bands * block), "white")
    pen = ImageDraw.Draw(sheet)
    for i, text in enumerate(texts):
        band, column = divmod(i, columns)
        x, y = margin + column * (width + gap), gap + band * block
        for number, words in enumerate(text):
            pen.text((x, y + head - 4 - line * (len(text) - number)), words, fill=(31, 31, 51))
        for number, (name, images) in enumerate(rows.items()):
            top = y + head + number * (height + 4)
            shown = images[i].convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(shown, (x, top))
            if named and column == 0:
                pen.text((gap, top + height // 2), name, fill=(110, 112, 130), anchor="lm")
    return sheet


def _wrapped(pen: Any, text: str, width: int, most: int = 3) -> list[str]:
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
