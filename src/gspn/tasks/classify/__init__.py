"""Image classification: train, evaluate and apply models of timm's registry, including those of :mod:`gspn.models`.

Example:
    Train and evaluate, here for one epoch on handwritten digits::

        from gspn.tasks.classify import TrainConfig, evaluate, predict, train

        config = TrainConfig.load("digits_pico").changed("schedule.epochs=1", "run.output=runs/digits")
        result = train(config)
        print(result.best_score, evaluate("runs/digits/best", data="digits").top1)
        predict(["digit.png"], model="runs/digits/best")
"""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

from .config import AffineConfig, AugmentConfig, DataConfig, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from .evaluation import Evaluation, evaluate
    from .prediction import Prediction, predict
    from .training import train

__all__ = [
    "AffineConfig",
    "AugmentConfig",
    "DataConfig",
    "Evaluation",
    "ModelConfig",
    "Prediction",
    "TrainConfig",
    "evaluate",
    "predict",
    "train",
]

# These need timm, accelerate and torchmetrics, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Evaluation": ".evaluation",
        "Prediction": ".prediction",
        "evaluate": ".evaluation",
        "predict": ".prediction",
        "train": ".training",
    },
    eager=__all__,
)
