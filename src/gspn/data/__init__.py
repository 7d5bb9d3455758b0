"""Data sets, and wrappers that make an epoch complete and repeatable; needs ``pip install 'gspn[train]'``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .base import LabelledImages
    from .captions.base import CaptionedImages
    from .captions.emoji import EmojiCaptions
    from .corrupt_images import CorruptImages, CorruptImageWarning, SkipCorrupt, collate
    from .deterministic_augmentation import DeterministicAugmentation
    from .digits import Digits, MNIST5k
    from .emoji import Emoji, EmojiRecord
    from .images import MAX_PIXELS, CorruptImageError, load_image
    from .registry import help_text, open_captions, open_dataset

__all__ = [
    "MAX_PIXELS", "CaptionedImages", "CorruptImageError", "CorruptImageWarning", "CorruptImages",
    "DeterministicAugmentation", "Digits", "Emoji", "EmojiCaptions", "EmojiRecord", "LabelledImages", "MNIST5k",
    "SkipCorrupt", "collate", "help_text", "load_image", "open_captions", "open_dataset",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "LabelledImages": ".base",
        "CaptionedImages": ".captions.base",
        "EmojiCaptions": ".captions.emoji",
        **dict.fromkeys(("CorruptImages", "CorruptImageWarning", "SkipCorrupt", "collate"), ".corrupt_images"),
        "DeterministicAugmentation": ".deterministic_augmentation",
        **dict.fromkeys(("Digits", "MNIST5k"), ".digits"),
        **dict.fromkeys(("Emoji", "EmojiRecord"), ".emoji"),
        **dict.fromkeys(("MAX_PIXELS", "CorruptImageError", "load_image"), ".images"),
        **dict.fromkeys(("help_text", "open_captions", "open_dataset"), ".registry"),
    },
)
