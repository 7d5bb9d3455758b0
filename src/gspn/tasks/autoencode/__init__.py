"""Autoencoders of images, whose latents other tasks learn: train one.

Example:
    Train on the emoji of the package::

        from gspn.tasks.autoencode import AutoencodeConfig, train

        train(AutoencodeConfig.load("emoji64").changed("run.output=runs/vae"))
"""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

from .config import AutoencodeConfig, DataConfig, LossConfig, ModelConfig

if TYPE_CHECKING:
    from .training import train

__all__ = ["AutoencodeConfig", "DataConfig", "LossConfig", "ModelConfig", "train"]

# It needs diffusers and accelerate, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(__name__, {"train": ".training"}, eager=__all__)
