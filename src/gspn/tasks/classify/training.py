"""Training a classifier: :func:`train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..core.errors import require
from ..core.loop import Position, TrainingRun, connected
from ..core.records import EpochRow
from ..core.sections import Resolved
from .config import ResolvedClassifier, TrainConfig
from .loaders import class_names, eval_batch_size, eval_loader, open_pair, train_loader
from .model import build_model, resolve_preprocessing, save_config, save_weights
from .steps import Figures, evaluate_batches, make_criterion, make_mixup


@dataclass(frozen=True)
class ClassifierRow(EpochRow):
    """One row of ``metrics.csv``. Figures of an epoch that was not evaluated are None; accuracies are in percent."""

    eval_loss: float | None
    top1: float | None
    top5: float | None
    ema_loss: float | None
    ema_top1: float | None


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to.

    Attributes:
        output: The run's directory: ``config.yaml``, ``metrics.csv``, ``best``, ``last``, ``checkpoints``.
        best_top1: Best evaluated accuracy in percent, of the weights or of their average.
        best_epoch: The epoch after which it was reached, counted from 1.
        last: The last row of the table.
        broken: Names of training images that could not be read, as far as this process met them.
        is_main: Whether this is the process that writes and prints.
    """

    output: Path
    best_top1: float
    best_epoch: int
    last: ClassifierRow | None
    broken: tuple[str, ...] = ()
    is_main: bool = True


@dataclass
class _Best(Position):
    """The position, and what was reached where."""

    best_top1: float = -1.0
    best_epoch: int = 0


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train a classifier as a configuration says.

    Runs in one process, or in each of several started by ``torchrun`` or ``accelerate launch``; the first one writes
    and prints. The output directory receives ``config.yaml`` (with what follows from it under ``resolved``),
    ``metrics.csv`` (a :class:`ClassifierRow` an epoch), ``tensorboard/``, and in ``best/`` and ``last/`` a
    ``model.safetensors`` and a ``config.json`` that ``timm.create_model("local-dir:...", pretrained=True)`` loads.
    These hold the average of the weights where one is kept; ``best`` that of the two which is more accurate.

    Every random number is a function of seed, epoch, update and process. A run that was killed at any moment and
    resumed therefore ends with the weights of the uninterrupted one, bit for bit wherever the kernels are
    deterministic: always on a CPU with as many threads, on CUDA with ``run.deterministic``.

    Args:
        config: What to do.
        resume: Continue from the newest whole checkpoint in the output directory; from the start if there is none.
        console: Where to print; standard output by default.

    Returns:
        The best accuracy and where everything is.

    Raises:
        UsageError: a request that cannot be met, such as an unknown model, an output directory that holds another
            run, or a resumed run whose configuration differs; also where the loss is not finite any more.
        MissingExtraError: timm, accelerate or another package of ``gspn[train]`` is not installed.

    Example:
        >>> from gspn.tasks.classify import load_config, train
        >>> config = load_config("digits_pico").changed("schedule.epochs=1", "run.output=/tmp/digits")
        >>> train(config).best_top1  # doctest: +SKIP
        62.4
    """
    require("accelerate", "timm", "torchvision", "safetensors", "yaml")
    return connected(lambda: _ClassifierRun(config, resume, console or Console()).fit())


class _ClassifierRun(TrainingRun[ClassifierRow, _Best]):
    row = ClassifierRow
    where = _Best

    def _open(self, config: TrainConfig) -> nn.Module:
        train_data, eval_data = open_pair(config.data)
        self.eval_images = len(eval_data)
        self.classes = class_names(train_data)
        network = build_model(config.model, num_classes=len(self.classes), size=config.data.size)
        self.preprocessing = resolve_preprocessing(network, config.data)
        self.train_loader = train_loader(train_data, config, self.preprocessing, **self.places)
        self.eval_loader = eval_loader(
            eval_data,
            self.preprocessing,
            batch_size=eval_batch_size(config.data),
            workers=config.data.workers,
            **self.places,
        )
        self.mixup = make_mixup(config, len(self.classes))
        self.criterion = make_criterion(config)
        return network

    def _classes(self) -> int:
        return len(self.classes)

    def _resolve(self, config: TrainConfig, network: nn.Module, shared: Resolved) -> ResolvedClassifier:
        del config, network
        return ResolvedClassifier(**asdict(shared), eval_images=self.eval_images, **asdict(self.preprocessing))

    def _announcement(self) -> list[str]:
        config, resolved = self.config, self.config.resolved
        images = f"{resolved.train_images:,} + {resolved.eval_images:,} images, {resolved.num_classes} classes"
        return [
            f"{config.model.name}, {resolved.parameters / 1e6:.2f} M parameters, on {self._place()}",
            f"{config.data.name}: {images}, {config.data.size} pixels",
        ]

    def _broken_records(self) -> list[Any]:
        return [self.train_loader.broken, self.eval_loader.broken]

    def fit(self) -> TrainResult:
        """Train, and say what came of it."""
        self.run()
        position = self.position
        return TrainResult(
            self.output,
            position.best_top1,
            position.best_epoch,
            self.table.last(),
            tuple(self.train_loader.broken.names.values()),
            self.main,
        )

    def _begin(self, epoch: int) -> None:
        until = self.config.augment.mix_epochs
        if self.mixup is not None and until is not None:
            self.mixup.mixup_enabled = epoch < until

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        return self.criterion(self.model(images), targets)

    def _finish(self, shared: dict[str, Any], last: bool) -> tuple[ClassifierRow, list[str], bool]:
        epoch = shared["epoch"]
        raw = ema = None
        if last or epoch % self.config.run.eval_every == 0:
            self.reporter.doing("evaluating", epoch - 1)
            raw = self._evaluate(self.accelerator.unwrap_model(self.model))
            ema = None if self.ema is None else self._evaluate(self.ema.module)
        row = ClassifierRow(
            **shared,
            eval_loss=raw and raw.loss,
            top1=raw and raw.top1,
            top5=raw and raw.top5,
            ema_loss=ema and ema.loss,
            ema_top1=ema and ema.top1,
        )
        found = []
        if row.top1 is not None:
            found = [f"eval {row.eval_loss:.4f}", f"top-1 {row.top1:.2f}"]
            if row.ema_top1 is not None:
                found.append(f"ema {row.ema_top1:.2f}")
        return row, found, self._write_weights(row)

    def _write_weights(self, row: ClassifierRow) -> bool:
        """Write `last`, and `best` where this is the best epoch so far; says whether it is."""
        position = self.position
        weights = self.weights()
        top1 = {"raw": row.top1, "ema": row.ema_top1}
        self._save_weights("last", "ema" if "ema" in weights else "raw", weights, top1, row.epoch)
        # The average where both are as good: it varies less.
        which = max(weights, key=lambda one: (-1.0 if top1[one] is None else top1[one], one == "ema"))
        reached = top1[which]
        if reached is None or reached <= position.best_top1:
            return False
        position.best_top1, position.best_epoch = reached, row.epoch
        self._save_weights("best", which, weights, top1, row.epoch)
        return True

    def _save_weights(
        self, name: str, which: str, weights: dict[str, Any], top1: dict[str, float | None], epoch: int
    ) -> None:
        if self.main:
            directory = self.output / name
            save_config(directory, self.network, self.config.model, self.preprocessing, self.classes)
            save_weights(directory, weights[which], {"epoch": epoch, "weights": which, "top1": top1[which]})

    def _evaluate(self, model: nn.Module) -> Figures:
        if self.accelerator.num_processes > 1 and not self.sharded:
            # Running statistics are each process's own until the first one's are taken.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return evaluate_batches(
            model, self.eval_loader, self.accelerator, channels_last=self.config.model.channels_last
        )
