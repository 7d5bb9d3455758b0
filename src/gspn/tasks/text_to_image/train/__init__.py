"""Train a UNet from captions."""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

if TYPE_CHECKING:
    from .training import TextToImageResult, train

# These need diffusers and accelerate, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(__name__, {"TextToImageResult": ".training", "train": ".training"})

__all__ = ["TextToImageResult", "train"]
