"""Data sets, and what keeps an epoch whole and repeatable; needs ``pip install 'gspn[train]'``."""

from gspn.data.base import Pictures
from gspn.data.broken import BrokenImages, BrokenImageWarning, SkipBroken, collate
from gspn.data.captions import CaptionedPictures, EmojiCaptions, open_captions
from gspn.data.digits import Digits, MNIST5k
from gspn.data.emoji import Emoji, EmojiRecord
from gspn.data.images import MAX_PIXELS, BrokenImageError, load_image
from gspn.data.opening import DATASETS, open_dataset
from gspn.data.seeded import Seeded

__all__ = [
    "DATASETS",
    "MAX_PIXELS",
    "BrokenImageError",
    "BrokenImageWarning",
    "BrokenImages",
    "CaptionedPictures",
    "Digits",
    "Emoji",
    "EmojiCaptions",
    "EmojiRecord",
    "MNIST5k",
    "Pictures",
    "Seeded",
    "SkipBroken",
    "collate",
    "load_image",
    "open_captions",
    "open_dataset",
]
