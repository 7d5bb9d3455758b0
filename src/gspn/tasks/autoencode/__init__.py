"""Autoencoders of images, whose latents other tasks learn: train one.

Example:
    Train on the emoji of the package::

        from gspn.tasks.autoencode import load_config, train

        train(load_config("emoji64").changed("run.output=runs/vae"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import AutoencodeConfig, DataConfig, LossConfig, ModelConfig

if TYPE_CHECKING:
    from .training import AutoencodeResult, train

load_config = AutoencodeConfig.load
"""Read a configuration from a YAML file, or from the preset of that name (:func:`preset_names`)."""

preset_names = AutoencodeConfig.preset_names
"""The names of the presets that come with the package."""


def __getattr__(name: str) -> Any:
    if name in ("AutoencodeResult", "train"):  # which need diffusers and accelerate
        return getattr(importlib.import_module(".training", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AutoencodeConfig",
    "AutoencodeResult",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "load_config",
    "preset_names",
    "train",
]
