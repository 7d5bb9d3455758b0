"""Class-conditional generation: train denoisers, draw with them, and measure what they draw.

Example:
    Train on handwritten digits and draw some::

        from gspn.tasks.generate import load_config, sample, train

        result = train(load_config("mnist5k").changed("schedule.epochs=5", "run.output=runs/digits"))
        sample("runs/digits", output="runs/digits/threes", classes=[3], number=16)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import DataConfig, DiffusionConfig, GenerateConfig, ModelConfig, SamplesConfig

if TYPE_CHECKING:
    from .caching import CachedLatents, cache_latents
    from .evaluation import Evaluation, evaluate
    from .latents import LatentSet, open_latents
    from .network import load_pipeline, shipped_pipelines
    from .sampling import Samples, sample
    from .training import GenerateResult, train

load_config = GenerateConfig.load
"""Read a configuration from a YAML file, or from the recipe of that name (:func:`recipe_names`)."""

recipe_names = GenerateConfig.recipe_names
"""The names of the recipes that come with the package."""

# These need diffusers and accelerate, which reading a configuration does not.
_LATER = {
    "CachedLatents": "caching",
    "Evaluation": "evaluation",
    "GenerateResult": "training",
    "LatentSet": "latents",
    "Samples": "sampling",
    "cache_latents": "caching",
    "evaluate": "evaluation",
    "load_pipeline": "network",
    "open_latents": "latents",
    "sample": "sampling",
    "shipped_pipelines": "network",
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
    "recipe_names",
    "sample",
    "shipped_pipelines",
    "train",
]
