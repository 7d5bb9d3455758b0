"""A toy task for tests of the loop: a linear classifier of noisy points, with dropout, that trains in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from gspn.tasks.core.loop import fit
from gspn.tasks.core.metrics_table import EpochRow, metric
from gspn.tasks.core.sections import (
    Configuration,
    EmaConfig,
    ImageData,
    ModelExecution,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from gspn.tasks.core.task import Setup, Task

CLASSES = 4


class Points(Dataset):
    """Noisy one-pixel images of 16 channels; each sample has its own noise, as augmented images do."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.count = count
        self.broken = broken
        self.centres = torch.randn(CLASSES, 16, 1, 1, generator=torch.Generator().manual_seed(0))
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.broken:
            raise OSError("cannot be read")
        self.loaded.append(index)
        return self.centres[index % CLASSES] + 0.5 * torch.randn(16, 1, 1), index % CLASSES

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"point {index}"


@dataclass(frozen=True)
class ToyConfig(Configuration):
    data: ImageData = ImageData(batch_size=8, workers=0)
    model: ModelExecution = ModelExecution(channels_last=False)
    optim: OptimConfig = OptimConfig(lr=0.01, lr_base_batch=None, clip_grad=1.0)
    schedule: ScheduleConfig = ScheduleConfig(epochs=3, warmup_epochs=0.5)
    ema: EmaConfig = EmaConfig(decay=0.9)
    run: RunConfig = RunConfig(trackers=[], device="cpu", checkpoint_every_s=0.0, log_every=3)


@dataclass(frozen=True)
class ToyRow(EpochRow):
    eval_loss: float | None = metric("eval {:.3f}")
    ema_loss: float | None = metric()


class Toy(Task[ToyConfig, ToyRow]):
    row_type = ToyRow

    def __init__(self, config: ToyConfig, broken: int = -1) -> None:
        self.config = config
        self.points = Points(50, broken)
        self.saved: list[tuple[int, bool]] = []

    def setup(self, context):
        self.held_out = context.eval_loader(Points(11), batch_size=4, workers=0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, CLASSES))
        return Setup(
            model, context.train_loader(self.points), "toy", "points", ("a note",), self.held_out, CLASSES, {"side": 1}
        )

    def loss(self, model, images, targets, epoch):
        noise = 0.1 * torch.randn_like(images)
        return F.cross_entropy(model(images + noise), targets)

    def evaluate(self, models, context):
        def losses(model, images, targets):
            return {"loss": F.cross_entropy(model(images), targets, reduction="none")}

        return {
            name: context.mean_metrics(model, self.held_out, losses)["loss"]
            for name, model in (("eval_loss", models.raw), ("ema_loss", models.ema))
            if model is not None
        }

    def score(self, row):
        return None if row.ema_loss is None else -row.ema_loss + 10

    def save(self, weights, row, output, context, *, best):
        self.saved.append((row.epoch, best))
        for name in ["last"] + ["best"] * best:
            (output / name).mkdir(exist_ok=True)
            save_file(weights.averaged, output / name / "model.safetensors")


def toy(output: Path, *overrides: str, broken: int = -1) -> Toy:
    return Toy(ToyConfig().changed(*overrides, **{"run.output": output}), broken)


def resume(output: Path, *overrides: str) -> None:
    """Train, resuming what is there; for processes."""
    fit(toy(output, *overrides), resume=True)
