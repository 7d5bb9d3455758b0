"""Text to image: train a UNet, distil GSPN into it, draw with it at any size, and measure what it draws.

Example:
    Draw with what comes in the package, then at four times the size::

        from gspn.tasks.text_to_image import sample

        model, adapter = "gspn_text_to_image.emoji64", "gspn_adapter.emoji64"
        sample(model, "grinning cat", adapter=adapter, output="samples")
        sample(model, "grinning cat", adapter=adapter, output="large", height=256, width=256, ladder=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import (
    AdapterConfig,
    DataConfig,
    DistillationConfig,
    DistillConfig,
    NoiseConfig,
    SamplesConfig,
    TextToImageConfig,
    UNetConfig,
)

if TYPE_CHECKING:
    from .conditioning import Conditioning, encode_prompts
    from .distill.training import DistillResult, distill
    from .evaluate.evaluation import TextEvaluation, evaluate
    from .evaluate.text_scores import TextScorer
    from .pipelines import load_adapter, load_pipeline, save_pipeline, shipped_adapters, shipped_pipelines
    from .sample.progressive_upscaling import LadderConfig
    from .sample.sampling import SampleResult, sample
    from .train.training import TextToImageResult, train

# These need diffusers and accelerate, which reading a configuration does not.
_LATER = {
    "Conditioning": "conditioning",
    "DistillResult": "distill.training",
    "LadderConfig": "sample.progressive_upscaling",
    "SampleResult": "sample.sampling",
    "TextEvaluation": "evaluate.evaluation",
    "TextScorer": "evaluate.text_scores",
    "TextToImageResult": "train.training",
    "distill": "distill.training",
    "encode_prompts": "conditioning",
    "evaluate": "evaluate.evaluation",
    "load_adapter": "pipelines",
    "load_pipeline": "pipelines",
    "sample": "sample.sampling",
    "save_pipeline": "pipelines",
    "shipped_adapters": "pipelines",
    "shipped_pipelines": "pipelines",
    "train": "train.training",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AdapterConfig",
    "Conditioning",
    "DataConfig",
    "DistillConfig",
    "DistillResult",
    "DistillationConfig",
    "LadderConfig",
    "NoiseConfig",
    "SampleResult",
    "SamplesConfig",
    "TextEvaluation",
    "TextScorer",
    "TextToImageConfig",
    "TextToImageResult",
    "UNetConfig",
    "distill",
    "encode_prompts",
    "evaluate",
    "load_adapter",
    "load_pipeline",
    "sample",
    "save_pipeline",
    "shipped_adapters",
    "shipped_pipelines",
    "train",
]
