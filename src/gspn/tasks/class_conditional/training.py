"""Training a generative model: :func:`train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..._files import replaced, replaced_directory
from ..core.errors import UsageError, require
from ..core.loop import Position, TrainingRun, connected, to_device
from ..core.records import EpochRow
from ..core.sections import Resolved
from ..core.seeding import derived_seed, random_state_kept, seed_everything
from ..diffusion.losses import DenoisingLoss
from ..diffusion.schedulers import sampler, training_scheduler
from .config import GenerateConfig, ResolvedGenerator
from .data import GenerateData, open_data_of
from .model import build_network
from .sampling import SampleRecord, draw, draw_grid


@dataclass(frozen=True)
class GeneratorRow(EpochRow):
    """One row of ``metrics.csv``; the held-out losses are None where there is nothing held out."""

    eval_loss: float | None
    """Mean over the held-out images, at times and noise that are the same after every epoch."""
    ema_loss: float | None
    """Likewise, of the averaged weights."""


@dataclass(frozen=True)
class GenerateResult:
    """What a training run came to.

    Attributes:
        output: The run's directory: ``config.yaml``, ``metrics.csv``, ``last``, ``samples``, ``checkpoints``.
        last: The last row of the table.
        broken: Names of training images that could not be read, as far as this process met them.
        is_main: Whether this is the process that writes and prints.
    """

    output: Path
    last: GeneratorRow | None
    broken: tuple[str, ...] = ()
    is_main: bool = True


def train(config: GenerateConfig, *, resume: bool = False, console: Console | None = None) -> GenerateResult:
    """Train a class-conditional denoiser of images, or of cached latents, as a configuration says.

    Runs in one process, or in each of several started by ``torchrun`` or ``accelerate launch``. The output directory
    receives ``config.yaml`` (with what follows from it under ``resolved``), ``metrics.csv`` (a :class:`GeneratorRow`
    an epoch), ``tensorboard/``, ``samples/`` (images drawn from the same noise as it learns), and in ``last/`` a
    pipeline that :class:`gspn.diffusers.ClassConditionalPipeline` and :func:`gspn.tasks.class_conditional.sample`
    load, with the average of the weights where one is kept.

    Every random number is a function of seed, epoch, update and process, so that a run that was killed and resumed ends
    with the weights of the uninterrupted one, as :func:`gspn.tasks.classify.train` does.

    Args:
        config: What to do.
        resume: Continue from the newest whole checkpoint in the output directory; from the start if there is none.
        console: Where to print; standard output by default.

    Returns:
        Where everything is.

    Raises:
        UsageError: a request that cannot be met; also where the loss is not finite any more.
        MissingExtraError: diffusers, accelerate or another package is not installed.

    Example:
        >>> from gspn.tasks.class_conditional import load_config, train
        >>> train(load_config("mnist5k").changed("schedule.epochs=1", "run.output=/tmp/digits"))  # doctest: +SKIP
    """
    require("accelerate", "timm", "torchvision", "safetensors", "yaml")
    require("diffusers", extra="diffusers")
    return connected(lambda: _GeneratorRun(config, resume, console or Console()).fit())


class _GeneratorRun(TrainingRun[GeneratorRow, Position]):
    row = GeneratorRow

    def _open(self, config: GenerateConfig) -> nn.Module:
        from diffusers.models.embeddings import LabelEmbedding

        self.data: GenerateData = open_data_of(config, **self.places)
        self.train_loader = self.data.train
        network = build_network(
            config, num_classes=len(self.data.classes), channels=self.data.channels, sample_size=self.data.sample_size
        )
        for module in network.modules():
            # Labels are dropped here and once: DiT's blocks have an embedding each, and would not agree.
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        self.scheduler_of_noise = training_scheduler(config.diffusion, pixels=self.data.vae is None)
        self.denoising = DenoisingLoss(config.diffusion, self.scheduler_of_noise)
        return network

    def _classes(self) -> int:
        return len(self.data.classes)

    def _resolve(self, config: GenerateConfig, network: nn.Module, shared: Resolved) -> ResolvedGenerator:
        del config
        return ResolvedGenerator(
            **asdict(shared),
            in_channels=self.data.channels,
            out_channels=network.config.out_channels,  # type: ignore[union-attr]
            sample_size=self.data.sample_size,
            latents=self.data.latents,
        )

    def _announcement(self) -> list[str]:
        config, resolved = self.config, self.config.resolved
        what = "latents" if self.data.vae is not None else "pixels"
        shape = f"{resolved.in_channels} x {resolved.sample_size} x {resolved.sample_size}"
        network = f"{config.model.network} {config.model.size}, {resolved.parameters / 1e6:.2f} M parameters"
        data = f"{self.data.name}: {resolved.train_images:,} images, {resolved.num_classes} classes"
        return [f"{network}, on {self._place()}", f"{data}, {shape} {what}"]

    def fit(self) -> GenerateResult:
        """Train, and say what came of it."""
        self.run()
        return GenerateResult(self.output, self.table.last(), tuple(self.train_loader.broken.names.values()), self.main)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        dropped = torch.rand(len(targets)) < self.config.model.class_dropout
        labels = torch.where(dropped.to(targets.device), len(self.data.classes), targets)
        return self.denoising(self._predictor(self.model), self.data.prepared(images), labels)

    @staticmethod
    def _predictor(model: Any) -> Any:
        # A tuple: what gathers outputs over processes and precisions does not know diffusers' classes.
        return lambda x, t, labels: model(x, timestep=t, class_labels=labels, return_dict=False)[0]

    def _finish(self, shared: dict[str, Any], last: bool) -> tuple[GeneratorRow, list[str], bool]:
        epoch = shared["epoch"]
        raw = ema = None
        if self.data.held_out is not None and (last or epoch % self.config.run.eval_every == 0):
            self.reporter.doing("evaluating", epoch - 1)
            raw = self._held_out(self.model)
            ema = None if self.ema is None else self._held_out(self.ema.module)
        row = GeneratorRow(**shared, eval_loss=raw, ema_loss=ema)
        found = [] if raw is None else [f"eval {raw:.4f}"]
        if ema is not None:
            found.append(f"ema {ema:.4f}")
        weights = self.weights()
        if self.main:
            pipeline = self._pipeline(weights.get("ema", weights["raw"]))
            with replaced_directory(self.output / "last") as part:
                pipeline.save_pretrained(part, safe_serialization=True)
            every = self.config.samples.every
            if every and (last or epoch % every == 0):
                self.reporter.doing("drawing", epoch - 1)
                self._draw(pipeline, epoch, row.step)
        return row, found, False

    def _pipeline(self, weights: Any) -> Any:
        from gspn.diffusers import ClassConditionalPipeline

        with random_state_kept():  # of which building a network takes
            network = build_network(
                self.config,
                num_classes=len(self.data.classes),
                channels=self.data.channels,
                sample_size=self.data.sample_size,
            )
        network.load_state_dict({key: value.cpu() for key, value in weights.items()})
        return ClassConditionalPipeline(
            network.eval(),  # type: ignore[arg-type]
            self.scheduler_of_noise,
            self.data.vae,
            dict(enumerate(self.data.classes)),
            self.config.diffusion.scaling,
        )

    def _draw(self, pipeline: Any, epoch: int, step: int) -> None:
        """Some images of some classes, from the same noise after every epoch."""
        samples, count = self.config.samples, len(self.data.classes)
        shown = min(samples.classes, count)
        labels = [i * count // shown for i in range(shown)]
        pipeline.scheduler = sampler(samples.sampler, self.scheduler_of_noise)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.accelerator.device)
        side = pipeline.default_size
        records = [
            SampleRecord(
                i, labels[i % shown], self.data.classes[labels[i % shown]], self.config.run.seed,
                type(pipeline.scheduler).__name__, samples.steps, samples.guidance, side, side, "",
            )
            for i in range(shown * samples.columns)
        ]  # fmt: skip
        images: list[Any] = []
        size = self.config.data.batch_size
        with self.accelerator.autocast():
            for begin in range(0, len(records), size):
                images += draw(pipeline, records[begin : begin + size])
        grid = draw_grid(images, records, shown)
        with replaced(self.output / "samples" / f"epoch-{epoch:05d}.png") as part:
            grid.save(part, format="PNG")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC")

    @torch.no_grad()
    def _held_out(self, model: nn.Module) -> float:
        """The loss of the held-out images."""
        held_out = self.data.held_out
        if held_out is None:
            raise UsageError("nothing is held out; set data.eval_split.")
        training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with random_state_kept():
            for i, (images, targets) in enumerate(held_out):
                seed_everything(derived_seed(self.config.run.seed, "eval", i, self.accelerator.process_index))
                images = to_device(images, self.accelerator.device, self.config.model.channels_last)
                counts = targets >= 0
                targets = targets.clamp(min=0).to(self.accelerator.device)
                with self.accelerator.autocast():
                    each = self.denoising.each(self._predictor(model), self.data.prepared(images), targets)
                sums += torch.stack([each.cpu().double()[counts].sum(), counts.sum().double()])
        model.train(training)
        total, count = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()  # type: ignore[union-attr]
        return total / max(count, 1)
