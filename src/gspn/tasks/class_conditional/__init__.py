"""Class-conditional generation: train denoisers, draw with them, and measure what they draw.

Example:
    Train on handwritten digits and draw some::

        from gspn.tasks.class_conditional import load_config, sample, train

        result = train(load_config("mnist5k").changed("schedule.epochs=5", "run.output=runs/digits"))
        sample("runs/digits", output="runs/digits/threes", classes=[3], number=16)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import DataConfig, DiffusionConfig, GenerateConfig, ModelConfig, SamplesConfig

if TYPE_CHECKING:
    from ..diffusion.latent_cache import CachedLatents, cache_latents
    from ..diffusion.latents import LatentSet, open_latents
    from .evaluation import Evaluation, evaluate
    from .model import load_pipeline, shipped_pipelines
    from .sampling import Samples, sample
    from .training import GenerateResult, train

load_config = GenerateConfig.load
"""Read a configuration from a YAML file, or from the preset of that name (:func:`preset_names`)."""

preset_names = GenerateConfig.preset_names
"""The names of the presets that come with the package."""

# These need diffusers and accelerate, which reading a configuration does not.
_LATER = {
    "CachedLatents": ".diffusion.latent_cache",
    "Evaluation": "evaluation",
    "GenerateResult": "training",
    "LatentSet": ".diffusion.latents",
    "Samples": "sampling",
    "cache_latents": ".diffusion.latent_cache",
    "evaluate": "evaluation",
    "load_pipeline": "model",
    "open_latents": ".diffusion.latents",
    "sample": "sampling",
    "shipped_pipelines": "model",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "CachedLatents",
    "DataConfig",
    "DiffusionConfig",
    "Evaluation",
    "GenerateConfig",
    "GenerateResult",
    "LatentSet",
    "ModelConfig",
    "Samples",
    "SamplesConfig",
    "cache_latents",
    "evaluate",
    "load_config",
    "load_pipeline",
    "open_latents",
    "preset_names",
    "sample",
    "shipped_pipelines",
    "train",
]
