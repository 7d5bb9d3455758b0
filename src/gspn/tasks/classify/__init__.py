"""Image classification: train, evaluate and apply networks of timm's registry, those of :mod:`gspn.models` among them.

Example:
    Train and evaluate, here for one epoch on handwritten digits::

        from gspn.tasks.classify import evaluate, load_config, predict, train

        config = load_config("digits_pico").changed("schedule.epochs=1", "run.output=runs/digits")
        result = train(config)
        print(result.best_top1, evaluate("runs/digits/best", data="digits").top1)
        predict(["digit.png"], model="runs/digits/best")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..core.sections import EmaConfig, OptimConfig, RunConfig, ScheduleConfig
from .config import (
    AffineConfig,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
    load_config,
    preset_names,
)

if TYPE_CHECKING:
    from .evaluation import Evaluation, evaluate
    from .prediction import Prediction, predict
    from .training import TrainResult, train

# These need timm, accelerate and torchmetrics, which reading a configuration does not.
_LATER = {
    "Evaluation": "evaluation",
    "Prediction": "prediction",
    "TrainResult": "training",
    "evaluate": "evaluation",
    "predict": "prediction",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AffineConfig",
    "AugmentConfig",
    "DataConfig",
    "EmaConfig",
    "Evaluation",
    "ModelConfig",
    "OptimConfig",
    "Prediction",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_config",
    "predict",
    "preset_names",
    "train",
]
