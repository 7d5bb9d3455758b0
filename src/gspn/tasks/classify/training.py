"""Training a classifier: :func:`train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..._errors import require
from ..core.loaders import class_names, open_splits
from ..core.loop import fit
from ..core.metrics_table import EpochRow, metric
from ..core.task import Context, Models, Setup, Task, TrainingResult, Weights
from .config import TrainConfig
from .data import train_transform
from .evaluation import evaluate_batches
from .model import build_model, resolve_preprocessing, save_config, save_weights


@dataclass(frozen=True)
class ClassifierRow(EpochRow):
    """One row of ``metrics.csv``; accuracies are in percent. Metrics are None after an epoch without evaluation."""

    eval_loss: float | None = metric("eval {:.4f}")
    top1: float | None = metric("top-1 {:.2f}")
    top5: float | None = metric()
    ema_loss: float | None = metric()
    ema_top1: float | None = metric("ema {:.2f}")


def train(
    config: TrainConfig, *, resume: bool = False, console: Console | None = None
) -> TrainingResult[ClassifierRow]:
    """Train a classifier.

    The output directory receives ``config.yaml`` (with what follows from it under ``resolved``), ``metrics.csv`` (a
    :class:`ClassifierRow` per epoch), ``tensorboard/``, and in ``best/`` and ``last/`` a ``model.safetensors`` and a
    ``config.json`` that ``timm.create_model("local-dir:...", pretrained=True)`` loads. ``last`` holds the average of
    the weights where one is kept; ``best`` holds the weights or their average, whichever is more accurate.

    Runs in one process or several, and resumes a killed run to the same weights: see :func:`gspn.tasks.core.loop.fit`
    for this, for ``resume`` and ``console``, and for the errors.

    Returns:
        The result; ``best_score`` is the best top-1 accuracy in percent.

    Example:
        >>> from gspn.tasks.classify import TrainConfig, train
        >>> config = TrainConfig.load("digits_pico").changed("schedule.epochs=1", "run.output=/tmp/digits")
        >>> train(config).best_score  # doctest: +SKIP
        62.4
    """
    return fit(Classification(config), resume=resume, console=console)


class Classification(Task[TrainConfig, ClassifierRow]):
    """Training of a classifier."""

    row_type = ClassifierRow

    def setup(self, context: Context) -> Setup:
        """Open both splits and build the model and the loss."""
        config, data = self.config, self.config.data
        train_data, eval_data = open_splits(data)
        self.classes = class_names(train_data)
        sizes = data.sizes or ()
        self.model = build_model(config.model, num_classes=len(self.classes), size=data.size, sizes=sizes)
        self.preprocessing = resolve_preprocessing(self.model, data)
        train_data.transform = train_transform(config.augment, self.preprocessing)
        transforms = {
            size: train_transform(config.augment, replace(self.preprocessing, input_size=(3, size, size)))
            for size in sizes
        }
        eval_data.transform = self.preprocessing.transform()
        self.eval_loader = context.eval_loader(eval_data, data.eval_batch_size)
        self.mixup = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
        if config.mixes:
            self.mixup = require("timm.data").Mixup(
                mixup_alpha=config.augment.mixup,
                cutmix_alpha=config.augment.cutmix,
                prob=config.augment.mix_prob,
                switch_prob=config.augment.mix_switch_prob,
                mode=config.augment.mix_mode,
                label_smoothing=config.optim.label_smoothing,
                num_classes=len(self.classes),
            )
            self.criterion = require("timm.loss").SoftTargetCrossEntropy()
        images = f"{len(train_data):,} + {len(eval_data):,} images, {len(self.classes)} classes"
        return Setup(
            model=self.model,
            train=context.train_loader(train_data, transforms, multiple=2 if config.mixes else 1),
            evaluation=self.eval_loader,
            model_title=config.model.name,
            data_title=f"{data.name}: {images}, {data.size} pixels",
            num_classes=len(self.classes),
            resolved={"eval_images": len(eval_data), **asdict(self.preprocessing)},
        )

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """Cross-entropy with mixed images and smoothed targets, as configured."""
        if self.mixup is not None:
            until = self.config.augment.mix_epochs
            self.mixup.mixup_enabled = until is None or epoch < until
            images, targets = self.mixup(images, targets)
        return self.criterion(model(images), targets)

    def evaluate(self, models: Models, context: Context) -> dict[str, float | None]:
        """Loss and accuracy of the weights and of their average."""
        raw = self._accuracy(context.accelerator.unwrap_model(models.raw), context)
        metrics: dict[str, float | None] = {"eval_loss": raw["loss"], "top1": raw["top1"], "top5": raw["top5"]}
        if models.ema is not None:
            ema = self._accuracy(models.ema, context)
            metrics |= {"ema_loss": ema["loss"], "ema_top1": ema["top1"]}
        return metrics

    def _accuracy(self, model: nn.Module, context: Context) -> dict[str, Any]:
        if context.accelerator.num_processes > 1 and not context.sharded:
            # Each process has running statistics of its own; all take the first one's.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return evaluate_batches(
            model, self.eval_loader, context.accelerator, channels_last=self.config.model.channels_last
        )

    def score(self, row: ClassifierRow) -> float | None:
        """The top-1 accuracy of the weights or of their average, whichever is higher."""
        return max((top1 for top1 in (row.top1, row.ema_top1) if top1 is not None), default=None)

    def save(self, weights: Weights, row: ClassifierRow, output: Path, context: Context, *, best: bool) -> None:
        """Write ``last``, and ``best`` after the best epoch so far."""
        del context
        states, top1 = {"raw": weights.raw, "ema": weights.ema}, {"raw": row.top1, "ema": row.ema_top1}
        saved = {"last": "raw" if weights.ema is None else "ema"}
        if best:
            # The average where both are equally accurate: it varies less.
            saved["best"] = "ema" if row.ema_top1 is not None and row.ema_top1 == self.score(row) else "raw"
        for name, which in saved.items():
            save_config(output / name, self.model, self.config.model, self.preprocessing, self.classes)
            metadata = {"epoch": row.epoch, "weights": which, "top1": top1[which]}
            save_weights(output / name, states[which] or {}, metadata)
