"""Class-conditional generation: train denoisers, draw samples from them, and evaluate the samples.

Example:
    Train on handwritten digits and draw some::

        from gspn.tasks.class_conditional import ClassConditionalConfig, sample, train

        train(ClassConditionalConfig.load("mnist5k").changed("schedule.epochs=5", "run.output=runs/digits"))
        sample("runs/digits", output="runs/digits/threes", classes=[3], number=16)
"""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

from ..diffusion.config import DiffusionConfig
from .config import ClassConditionalConfig, DataConfig, ModelConfig, SamplesConfig

if TYPE_CHECKING:
    from ..diffusion.latent_cache import CachedLatents, cache_latents
    from ..diffusion.latents import LatentSet, open_latents
    from .evaluation import Evaluation, evaluate
    from .model import load_pipeline, shipped_pipelines
    from .sampling import Samples, sample
    from .training import train

__all__ = [
    "CachedLatents",
    "ClassConditionalConfig",
    "DataConfig",
    "DiffusionConfig",
    "Evaluation",
    "LatentSet",
    "ModelConfig",
    "Samples",
    "SamplesConfig",
    "cache_latents",
    "evaluate",
    "load_pipeline",
    "open_latents",
    "sample",
    "shipped_pipelines",
    "train",
]

# These need diffusers and accelerate, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CachedLatents": "..diffusion.latent_cache",
        "Evaluation": ".evaluation",
        "LatentSet": "..diffusion.latents",
        "Samples": ".sampling",
        "cache_latents": "..diffusion.latent_cache",
        "evaluate": ".evaluation",
        "load_pipeline": ".model",
        "open_latents": "..diffusion.latents",
        "sample": ".sampling",
        "shipped_pipelines": ".model",
        "train": ".training",
    },
    eager=__all__,
)
