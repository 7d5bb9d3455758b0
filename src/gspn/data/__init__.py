"""Data sets, and what keeps an epoch whole and repeatable; needs ``pip install 'gspn[train]'``."""

from gspn.data.base import LabelledImages
from gspn.data.captions.emoji import CaptionedImages, EmojiCaptions, open_captions
from gspn.data.corrupt_images import BrokenImages, BrokenImageWarning, SkipBroken, collate
from gspn.data.deterministic_augmentation import Seeded
from gspn.data.digits import Digits, MNIST5k
from gspn.data.emoji import Emoji, EmojiRecord
from gspn.data.images import MAX_PIXELS, BrokenImageError, load_image
from gspn.data.registry import DATASETS, open_dataset

__all__ = [
    "DATASETS",
    "MAX_PIXELS",
    "BrokenImageError",
    "BrokenImageWarning",
    "BrokenImages",
    "CaptionedImages",
    "Digits",
    "Emoji",
    "EmojiCaptions",
    "EmojiRecord",
    "LabelledImages",
    "MNIST5k",
    "Seeded",
    "SkipBroken",
    "collate",
    "load_image",
    "open_captions",
    "open_dataset",
]
