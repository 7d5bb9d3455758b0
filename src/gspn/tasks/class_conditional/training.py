"""Training a class-conditional denoiser: :func:`train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from gspn.diffusers.timesteps import set_timesteps

from ..._errors import require
from ..._files import replaced_directory
from ..core.loop import fit
from ..core.metrics_table import EpochRow, metric
from ..core.seeding import random_state_kept
from ..core.task import Context, Models, Setup, Task, TrainingResult, Weights
from ..diffusion.losses import DenoisingLoss
from ..diffusion.schedulers import named_scheduler, training_scheduler
from .config import ClassConditionalConfig
from .data import open_data_of
from .model import build_denoiser, initialize_from
from .sampling import draw_classes, sample_batch, sample_records


@dataclass(frozen=True)
class GeneratorRow(EpochRow):
    """One row of ``metrics.csv``. The losses are None where there is no held-out data or no evaluation."""

    eval_loss: float | None = metric("eval {:.4f}")
    """Mean over the held-out images, at the same times and noise after every epoch."""
    ema_loss: float | None = metric("ema {:.4f}")
    """The same of the averaged weights."""


def train(
    config: ClassConditionalConfig, *, resume: bool = False, console: Console | None = None
) -> TrainingResult[GeneratorRow]:
    """Train a class-conditional denoiser of images, or of cached latents.

    The output directory receives ``config.yaml`` (with what follows from it under ``resolved``), ``metrics.csv`` (a
    :class:`GeneratorRow` per epoch), ``tensorboard/``, ``samples/`` (images drawn from the same noise during
    training), and in ``last/`` a pipeline that :class:`gspn.diffusers.ClassConditionalPipeline` and
    :func:`gspn.tasks.class_conditional.sample` load, with the average of the weights where one is kept.

    Runs in one process or several, and resumes a killed run to the same weights: see :func:`gspn.tasks.core.loop.fit`
    for this, for ``resume`` and ``console``, and for the errors.

    Example:
        >>> from gspn.tasks.class_conditional import ClassConditionalConfig, train
        >>> config = ClassConditionalConfig.load("mnist5k").changed("schedule.epochs=1", "run.output=/tmp/digits")
        >>> train(config)  # doctest: +SKIP
    """
    require("diffusers", extra="diffusers")
    return fit(ClassConditionalDenoising(config), resume=resume, console=console)


class ClassConditionalDenoising(Task[ClassConditionalConfig, GeneratorRow]):
    """Training of a class-conditional denoiser."""

    row_type = GeneratorRow

    def setup(self, context: Context) -> Setup:
        """Open the data and build the denoiser and the loss."""
        from diffusers.models.embeddings import LabelEmbedding

        model_config = self.config.model
        self.data = open_data_of(self.config, context)
        model = self._build_model()
        if model_config.init_from is not None:
            initialize_from(model, model_config.init_from)
        for module in model.modules():
            # Labels are dropped in `loss`: each of DiT's blocks has an embedding, and they would not agree.
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        self.scheduler = training_scheduler(self.config.diffusion, pixels=self.data.vae is None)
        if self.config.samples.every:  # refused now, not after the first epoch
            set_timesteps(named_scheduler(self.config.samples.scheduler, self.scheduler), self.config.samples.steps)
        self.denoising = DenoisingLoss(self.config.diffusion, self.scheduler)
        images, side = self.data.train.order.images, self.data.sample_size
        kind = "pixels" if self.data.vae is None else "latents"
        return Setup(
            model=model,
            train=self.data.train,
            evaluation=self.data.held_out,
            model_title=f"{model_config.name} {model_config.size}",
            data_title=f"{self.data.name}: {images:,} images, {len(self.data.classes)} classes, "
            f"{self.data.channels} x {side} x {side} {kind}",
            num_classes=len(self.data.classes),
            resolved={
                "in_channels": self.data.channels,
                "out_channels": model.config.out_channels,
                "sample_size": side,
                **self.data.digests,
            },
        )

    def _build_model(self) -> Any:
        data = self.data
        return build_denoiser(
            self.config, num_classes=len(data.classes), channels=data.channels, sample_size=data.sample_size
        )

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """The denoising loss, with some labels dropped."""
        del epoch
        dropped = torch.rand(len(targets)) < self.config.model.class_dropout
        labels = torch.where(dropped.to(targets.device), len(self.data.classes), targets)
        return self.denoising.each(_predictor(model), self.data.prepared(images), labels).mean()

    def evaluate(self, models: Models, context: Context) -> dict[str, float | None]:
        """The denoising loss of the held-out images."""

        def losses(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.denoising.each(_predictor(model), self.data.prepared(images), labels)}

        metrics: dict[str, float | None] = {}
        for name, model in (("eval_loss", models.raw), ("ema_loss", models.ema)):
            if model is not None and self.data.held_out is not None:
                metrics[name] = context.mean_metrics(model, self.data.held_out, losses)["loss"]
        return metrics

    def save(
        self, weights: Weights, row: GeneratorRow, output: Path, context: Context, *, best: bool
    ) -> Image.Image | None:
        """Write the pipeline; returns samples of some classes when they are due."""
        del best
        from gspn.diffusers import ClassConditionalPipeline

        with random_state_kept():  # building a model draws random numbers
            model = self._build_model()
        model.load_state_dict(weights.averaged)
        labels, scaling = dict(enumerate(self.data.classes)), self.config.diffusion.scaling
        pipeline = ClassConditionalPipeline(model.eval(), self.scheduler, self.data.vae, labels, scaling)
        with replaced_directory(output / "last") as part:
            pipeline.save_pretrained(part, safe_serialization=True)
        if not self.config.samples.due(row.epoch, self.config.schedule.epochs):
            return None
        context.reporter.doing("drawing")
        return self._draw(pipeline, context)

    def _draw(self, pipeline: Any, context: Context) -> Image.Image:
        """Samples of some classes, from the same noise after every epoch."""
        samples, classes = self.config.samples, self.data.classes
        shown = min(samples.classes, len(classes))
        labels = [i * len(classes) // shown for i in range(shown)]
        pipeline.scheduler = named_scheduler(samples.scheduler, self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(context.accelerator.device)
        common = {"seed": self.config.run.seed, "steps": samples.steps, "guidance": samples.guidance, "model": ""}
        records = sample_records(pipeline, labels, shown * samples.columns, **common)
        images: list[Any] = []
        size = self.config.data.batch_size
        with context.accelerator.autocast():
            for begin in range(0, len(records), size):
                images += sample_batch(pipeline, records[begin : begin + size])
        return draw_classes(images, records, shown)


def _predictor(model: Any) -> Any:
    # A tuple: what gathers outputs over processes and precisions does not know diffusers' classes.
    return lambda x, t, labels: model(x, timestep=t, class_labels=labels, return_dict=False)[0]
