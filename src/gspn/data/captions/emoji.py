"""The Noto emoji with captions."""

from __future__ import annotations

import re

from PIL import Image

from ..base import Transform
from ..emoji import Emoji, EmojiRecord
from .base import CaptionedImages

# Keywords beside the name in one caption, few enough that the caption is about the name.
_KEYWORDS = 3


class EmojiCaptions(CaptionedImages):
    """The emoji of ``gspn.data.Emoji``, with their names and keywords as captions.

    The first caption is the name. Each further caption is the name and the next three keywords in alphabetical order.
    Keywords that only repeat words are left out.

    Example:
        >>> from gspn.data import EmojiCaptions
        >>> EmojiCaptions("val").captions(0)[:2]
        ('grinning face with smiling eyes', 'grinning face with smiling eyes, grin, happy, laugh')
    """

    def __init__(self, split: str = "train", *, transform: Transform | None = None) -> None:
        self.emoji = Emoji(split)
        super().__init__("emoji", transform)
        for record in self.emoji.records:
            self.texts.append(_captions(record))

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, 64 x 64, before the transform."""
        return self.emoji.image(index)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The code points of emoji ``index`` as a file name, as in ``1f600.webp``."""
        return self.emoji.filename(index, basename, absolute)


def _captions(record: EmojiRecord) -> tuple[str, ...]:
    known = _words(record.name)
    more = []
    for keyword in record.keywords:
        if not _words(keyword) <= known:
            more.append(keyword)
            known |= _words(keyword)
    parts = [more[first : first + _KEYWORDS] for first in range(0, len(more), _KEYWORDS)]
    return (record.name, *(", ".join([record.name, *part]) for part in parts))


def _words(text: str) -> set[str]:
    """The words of a text without case and plural."""
    return {word.rstrip("s") for word in re.findall(r"\w+", text.lower())}
