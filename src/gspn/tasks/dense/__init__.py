"""Dense prediction: train, evaluate and apply models that predict a class or a number for each pixel.

A model is an encoder of timm, among them those of :mod:`gspn.models`, with a decoder of segmentation-models-pytorch.

Example:
    Train on a folder of images and maps, and write the maps of other images::

        from gspn.tasks.dense import DenseConfig, evaluate, predict, train

        config = DenseConfig().changed("data.name=folder", "data.root=pets", "run.output=runs/pets")
        result = train(config)
        print(result.best_score, evaluate("runs/pets", data="folder", root="pets").scores)
        predict(["photo.jpg"], "runs/pets", "maps")
"""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

from .config import AugmentConfig, DataConfig, DenseConfig, LossConfig, ModelConfig, WindowConfig

if TYPE_CHECKING:
    from .evaluation import Evaluation, evaluate
    from .metrics import ClassScores, NumberScores
    from .prediction import Prediction, predict
    from .training import train

__all__ = [
    "AugmentConfig",
    "ClassScores",
    "DataConfig",
    "DenseConfig",
    "Evaluation",
    "LossConfig",
    "ModelConfig",
    "NumberScores",
    "Prediction",
    "WindowConfig",
    "evaluate",
    "predict",
    "train",
]

# These need timm, accelerate and segmentation-models-pytorch, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Evaluation", "evaluate"), ".evaluation"),
        **dict.fromkeys(("ClassScores", "NumberScores"), ".metrics"),
        **dict.fromkeys(("Prediction", "predict"), ".prediction"),
        "train": ".training",
    },
    eager=__all__,
)
