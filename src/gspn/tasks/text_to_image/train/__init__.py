"""Train a UNet on images with captions."""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

from .config import NoiseConfig, TextToImageConfig, UNetConfig

if TYPE_CHECKING:
    from .training import train

__all__ = ["NoiseConfig", "TextToImageConfig", "UNetConfig", "train"]

# It needs diffusers and accelerate, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(__name__, {"train": ".training"}, eager=__all__)
