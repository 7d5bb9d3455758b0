"""Data sets, and wrappers that make an epoch complete and repeatable; needs ``pip install 'gspn[train]'``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .base import LabelledImages, Relabelled
    from .captions.base import CaptionedImages
    from .captions.emoji import EmojiCaptions
    from .corrupt_images import CorruptImages, CorruptImageWarning, SkipCorrupt, collate, collate_padded
    from .deterministic_augmentation import DeterministicAugmentation
    from .digits import Digits, MNIST5k
    from .emoji import Emoji, EmojiRecord
    from .files import LeftOut, LeftOutWarning, image_files, natural_order
    from .folder import class_of, index_of_classes
    from .images import MAX_PIXELS, CorruptImageError, load_image, to_rgb, trimmed
    from .maps.base import ImagesOnly, MapClasses, MappedImages
    from .maps.decoding import MapRule, load_map
    from .registry import help_text, open_captions, open_dataset, open_maps

__all__ = [
    "MAX_PIXELS", "CaptionedImages", "CorruptImageError", "CorruptImageWarning", "CorruptImages",
    "DeterministicAugmentation", "Digits", "Emoji", "EmojiCaptions", "EmojiRecord", "ImagesOnly", "LabelledImages",
    "LeftOut", "LeftOutWarning", "MNIST5k", "MapClasses", "MapRule", "MappedImages", "Relabelled", "SkipCorrupt",
    "class_of", "collate", "collate_padded", "help_text", "image_files", "index_of_classes", "load_image", "load_map",
    "natural_order", "open_captions", "open_dataset", "open_maps", "to_rgb", "trimmed",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("LabelledImages", "Relabelled"), ".base"),
        "CaptionedImages": ".captions.base",
        "EmojiCaptions": ".captions.emoji",
        **dict.fromkeys(
            ("CorruptImages", "CorruptImageWarning", "SkipCorrupt", "collate", "collate_padded"), ".corrupt_images"
        ),
        "DeterministicAugmentation": ".deterministic_augmentation",
        **dict.fromkeys(("Digits", "MNIST5k"), ".digits"),
        **dict.fromkeys(("Emoji", "EmojiRecord"), ".emoji"),
        **dict.fromkeys(("LeftOut", "LeftOutWarning", "image_files", "natural_order"), ".files"),
        **dict.fromkeys(("class_of", "index_of_classes"), ".folder"),
        **dict.fromkeys(("MAX_PIXELS", "CorruptImageError", "load_image", "to_rgb", "trimmed"), ".images"),
        **dict.fromkeys(("ImagesOnly", "MapClasses", "MappedImages"), ".maps.base"),
        **dict.fromkeys(("MapRule", "load_map"), ".maps.decoding"),
        **dict.fromkeys(("help_text", "open_captions", "open_dataset", "open_maps"), ".registry"),
    },
)
