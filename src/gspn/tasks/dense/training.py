"""Training a model of dense prediction: :func:`train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..._errors import UsageError, require
from ..core.config import to_mapping
from ..core.loop import fit
from ..core.metrics_table import EpochRow, metric
from ..core.task import Context, Models, Setup, Task, TrainingResult, Weights
from .config import DenseConfig
from .data import class_weights, make_target, open_split
from .drawing import colour_map, side_by_side
from .evaluation import check_same, evaluate_images
from .inference import Windows
from .metrics import ClassScores
from .model import build_model, resolve_normalization, save_model
from .transforms import RandomCrop, WholeImage, separate


@dataclass(frozen=True)
class DenseRow(EpochRow):
    """One row of ``metrics.csv``. Metrics are None after an epoch without evaluation, and those of the other kind.

    They are those of the averaged weights where an average is kept.
    """

    miou: float | None = metric("mIoU {:.2f}")
    """Classes: mean intersection over union in percent."""
    accuracy: float | None = metric("accuracy {:.2f}")
    """Classes: percent of the pixels."""
    mae: float | None = metric("error {:.4g}")
    """Numbers: mean absolute error, in their unit."""
    rmse: float | None = metric()
    abs_rel: float | None = metric("relative {:.3f}")
    delta1: float | None = metric()


def train(config: DenseConfig, *, resume: bool = False, console: Console | None = None) -> TrainingResult[DenseRow]:
    """Train a model to predict a class or a number for each pixel.

    The loss is the cross-entropy of classes, or the mean absolute error of numbers over their standard deviation; what
    a map ignores does not count.

    The output directory receives ``config.yaml``, ``metrics.csv`` (a :class:`DenseRow` per epoch), ``samples/`` (a
    held-out image, its map and the predicted one), and in ``best/`` and ``last/`` what
    ``segmentation_models_pytorch.from_pretrained`` and :func:`~gspn.tasks.dense.model.load_model` load: the average of
    the weights where one is kept.

    Runs in one process or several, and resumes a killed run to the same weights: see :func:`gspn.tasks.core.loop.fit`
    for this, for ``resume`` and ``console``, and for the errors.

    Returns:
        The result; ``best_score`` is the best mean intersection over union in percent, or for numbers
        ``100 / (1 + mae / std)``.
    """
    require("torchmetrics")
    require("segmentation_models_pytorch", extra="dense")
    return fit(DensePrediction(config), resume=resume, console=console)


class DensePrediction(Task[DenseConfig, DenseRow]):
    """Training of a model of dense prediction."""

    row_type = DenseRow

    def setup(self, context: Context) -> Setup:
        """Open both splits, measure what the loss needs, and build the model."""
        config, data = self.config, self.config.data
        if context.sharded:
            raise UsageError("FSDP is not supported for dense prediction; set run.fsdp=false (DDP).")
        train_data = open_split(data.name, data.train_split, data.root, **data.options)
        normalization = resolve_normalization(config.model, data)
        self.target = make_target(train_data, normalization, data.size)
        self.weights = class_weights(config, train_data)
        self.model = build_model(config.model, self.target)
        crops = {size: RandomCrop(size, config.augment, normalization) for size in (data.size, *(data.sizes or ()))}
        train_data.transform = crops[data.size]
        self.sample: Image.Image | None = None
        self.evaluation = None
        if data.eval_split is not None:
            held_out = open_split(data.name, data.eval_split, data.root, **data.options)
            check_same(self.target, held_out)
            held_out.transform = WholeImage(normalization)
            self.evaluation = context.eval_loader(held_out, batch_size=1)
        what = f"{len(self.target.classes)} classes" if self.target.classes else f"numbers in {self.target.unit}"
        images = f"{len(train_data):,} + {0 if self.evaluation is None else self.evaluation.share.images:,} images"
        weights = {} if self.weights is None else {"class_weights": self.weights.tolist()}
        return Setup(
            model=self.model,
            train=context.train_loader(train_data, crops if data.sizes else None),
            evaluation=self.evaluation,
            model_title=f"{config.model.name} + {config.model.decoder}",
            data_title=f"{data.name}: {images}, {what}, crops of {data.size} pixels",
            num_classes=len(self.target.classes),
            resolved={"target": to_mapping(asdict(self.target)), **weights},
        )

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """Cross-entropy or absolute error, over the pixels that are not ignored."""
        del targets, epoch  # the index of the image
        inputs, maps = separate(images)
        outputs = model(inputs).float()  # [B, K, H, W]
        ignored = maps.isnan()
        if self.target.classes:
            labels = maps.nan_to_num(0).long().masked_fill(ignored, -1)
            weights = None if self.weights is None else self.weights.to(outputs.device)
            smoothing = self.config.optim.label_smoothing
            summed = F.cross_entropy(
                outputs, labels, weights, ignore_index=-1, reduction="sum", label_smoothing=smoothing
            )
            known = ~ignored if weights is None else torch.where(ignored, 0, weights[labels.clamp(min=0)])
        else:
            expected = ((maps - self.target.mean) / self.target.std).masked_fill(ignored, 0)
            summed = (outputs[:, 0] - expected).abs().masked_fill(ignored, 0).sum()
            known = ~ignored
        return summed / known.sum().clamp(min=1e-6)  # a batch of ignored pixels alone has no gradient

    def evaluate(self, models: Models, context: Context) -> dict[str, float | None]:
        """The metrics on whole held-out images, and a sample of them."""
        if self.evaluation is None:
            return {}
        model: Any = context.accelerator.unwrap_model(models.raw) if models.ema is None else models.ema
        size = self.config.windows.window
        windows = Windows(
            self.config.data.size if size is None else size, self.config.windows.overlap, self.config.data.batch_size
        )

        def watch(image: Tensor, target: Tensor, predicted: Tensor) -> None:
            context.reporter.doing("evaluating")
            if self.sample is None:
                self.sample = self._drawn(image, target, predicted)

        scores = evaluate_images(model, self.evaluation, windows, context.accelerator, watch)
        names = ("miou", "accuracy") if isinstance(scores, ClassScores) else ("mae", "rmse", "abs_rel", "delta1")
        return {name: getattr(scores, name) for name in names}

    def _drawn(self, image: Tensor, target: Tensor, predicted: Tensor) -> Image.Image:
        normalization = self.target.normalization
        mean, std = (torch.tensor(one)[:, None, None] for one in (normalization.mean, normalization.std))
        pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
        maps = [colour_map(np.asarray(one, np.float32), self.target) for one in (target, predicted)]
        return side_by_side([Image.fromarray(pixels.numpy()), *maps], ["image", "map", "prediction"])

    def score(self, row: DenseRow) -> float | None:
        """The mean intersection over union, or ``100 / (1 + mae / std)``."""
        if row.miou is not None:
            return row.miou
        return None if row.mae is None else 100 / (1 + row.mae / self.target.std)

    def save(
        self, weights: Weights, row: DenseRow, output: Path, context: Context, *, best: bool
    ) -> Image.Image | None:
        """Write ``last``, and ``best`` after the best epoch so far; return the sample of the evaluation."""
        del context
        scores = {name: getattr(row, name) for name in ("miou", "mae") if getattr(row, name) is not None}
        metadata = {"epoch": row.epoch, "weights": "raw" if weights.ema is None else "ema", **scores}
        for name in ("last", "best") if best else ("last",):
            save_model(output / name, self.model, weights.averaged, metadata)
        sample, self.sample = self.sample, None
        return sample
