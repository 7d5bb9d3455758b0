"""Distilling an adapter from a text-to-image pipeline: :func:`distill`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from gspn.diffusers import GSPNAdapter

from ...._errors import UsageError
from ...._files import replaced_directory
from ...core.metrics_table import metric
from ...core.seeding import derived_seed, random_state_kept, seed_everything
from ...core.task import Context, TrainingResult
from ..caption_trainer import CaptionRow, CaptionTask
from ..conditioning import Conditioning
from ..data import read_text
from ..pipelines import load_adapter, load_pipeline
from .attention_matching import Distiller
from .config import DistillConfig
from .initialization import fit_gates

# Images that the gates are fitted on, and images at a time.
_FITTED_ON, _FITTED_AT_ONCE = 32, 8

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DistillRow(CaptionRow):
    """One row of ``metrics.csv``; adds the parts of the held-out loss, of the averaged weights where they exist."""

    eval_noise: float | None = metric()
    """Squared error against the noise, or whatever the teacher predicts."""
    eval_teacher: float | None = metric()
    """Squared error against the teacher's prediction."""
    eval_attention: float | None = metric()
    """Squared error against the attentions' outputs, a mean over the layers."""


def distill(
    config: DistillConfig, *, resume: bool = False, console: Console | None = None
) -> TrainingResult[DistillRow]:
    """Train an adapter that replaces a text-to-image pipeline's self-attention and draws the same images.

    Teacher and student are one UNet, with attention and with GSPN in its place; only the adapter is trained. For the
    noisy latents of an image with its caption, the loss is that of GSPN (arXiv 2501.12381)::

        ‖ε_s - ε‖² + 1/2 ‖ε_s - ε_t‖² + 1/2 mean over layers of ‖a_s - a_t‖²

    where ``ε_s`` and ``ε_t`` are the predictions of student and teacher, ``ε`` is the noise (or the velocity, for a
    teacher that predicts it), and ``a_t`` and ``a_s`` are the outputs of an attention and of the mixer in its place.
    All squares are means over their numbers. In the first ``distillation.block_epochs`` epochs each mixer separately
    learns ``a_t`` from the input of its attention. This runs no student and costs one forward pass of
    the teacher.

    Latents and captions are first encoded, once, into ``data.cache``. The output directory receives ``config.yaml``,
    ``metrics.csv`` (a :class:`DistillRow` per epoch), ``samples/`` (teacher and student, from the same noise) and in
    ``last/`` the adapter, :class:`gspn.diffusers.GSPNAdapter`, with the average of the weights where one is kept.

    Runs in one process or several, and resumes a killed run to the same weights: see :func:`gspn.tasks.core.loop.fit`.

    Args:
        config: The configuration.
        resume: Continue from the newest complete checkpoint in the output directory, from the start if there is none.
        console: Where to print; standard output by default.

    Raises:
        UsageError: a request that cannot be met; also a loss that is not finite.
        MissingExtraError: diffusers, accelerate or another package is not installed.

    Example:
        >>> from gspn.tasks.text_to_image.distill import DistillConfig, distill
        >>> distill(DistillConfig.load("emoji64").changed("schedule.epochs=1"))  # doctest: +SKIP
    """
    old = (config.run.output / "checkpoints").glob("step-*/optimizer.bin")
    if resume and config.model.init_from and config.ema.decay is None and any(old):
        raise UsageError(
            f"the run in {str(config.run.output)!r} is of version 0.1.0 and has no average, which would tell the order "
            "of its optimizer's state; start another run with its last/ as model.init_from."
        )
    return Distillation(config).train(resume, console)


class Distillation(CaptionTask[DistillConfig, DistillRow]):
    """Distillation of an adapter on encoded images and captions."""

    row_type = DistillRow
    config: DistillConfig

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config)
        self._teachers_images: list[Image.Image] = []

    def open_pipeline(self) -> Any:
        """The teacher; an adapter that does not fit it is refused."""
        pipeline = load_pipeline(self.config.teacher)
        build_adapter(self.config, pipeline.unet)
        return pipeline

    def build_model(self, context: Context) -> tuple[nn.Module, str, list[str]]:
        """Teacher and student, whose gates are fitted if the configuration says so."""
        config, device = self.config, context.accelerator.device
        self.scheduler: Any = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        teacher = nn.Module.to(self.pipeline.unet, _DTYPES[config.model.weights])
        adapter = build_adapter(config, teacher)
        self.distiller = Distiller(teacher, adapter, self.data.pixels, relative=config.distillation.relative)
        self.distiller.move_to(device, channels_last=config.model.channels_last)
        try:
            adapter.freeze_model(config.distillation.layers)
        except ValueError as error:
            raise UsageError(f"distillation.layers: {error}") from None
        self.unfuse_attention(self.distiller.student, context)  # its cross-attentions; the teacher has no backward pass
        if config.model.normalize_scans and config.model.init_from is None:
            with context.accelerator.autocast():  # the teacher may be in half precision, the adapter is not
                self._record_lines(device)
        notes = []
        if config.model.initialize == "fit" and config.model.init_from is None:
            batches = list(self._first_batches(context))  # before autocast, which reading files does not need
            with context.accelerator.autocast():
                explained = fit_gates(self.distiller, batches)
            mean = sum(explained.values()) / len(explained)
            notes.append(f"constant gates explain {100 * mean:.0f} % of the attention's variance, a mean over layers")
        if config.model.grad_checkpointing:
            self.distiller.student.enable_gradient_checkpointing()
        return self.distiller, f"adapter of {len(adapter.mixers)} layers for {config.teacher}", notes

    def _record_lines(self, device: torch.device) -> None:
        """Give the adapter the lines of each layer's map at the training size, at which lam is as it is."""
        distiller, dtype = self.distiller, self.distiller.teacher.dtype
        t = torch.zeros(1, dtype=torch.long, device=device)
        text = read_text(self.data.train.text, t.cpu(), device).to(dtype)
        latents = torch.zeros(1, *self.data.shape, device=device, dtype=dtype)
        sizes = distiller.map_sizes(latents, t, distiller.arguments(latents, text))
        scans: dict[str, Any] = {name: mixer.scan for name, mixer in distiller.adapter.mixers.items()}
        distiller.adapter.set_reference_lines(
            {name: min(max(size), scans[name].segment or max(size)) for name, size in sizes.items()}
        )

    def _first_batches(self, context: Context) -> Iterator[tuple[Tensor, Tensor, Conditioning]]:
        """Some training images with noise, the same in every process and whenever the run is resumed."""
        seed_everything(derived_seed(self.config.run.seed, "fit"))
        latents, text = self.data.train.latents, self.data.train.text
        chosen = torch.randperm(len(latents))[:_FITTED_ON]
        for some in chosen.split(_FITTED_AT_ONCE):
            posterior, indices = zip(*(latents[i] for i in some.tolist()), strict=True)
            start = context.to_device(torch.stack(posterior))
            rows = text.sample_rows(torch.tensor(indices), self.caption_dropout)
            noisy, t, _ = self.noised(self.data.start(start))
            yield noisy, t, read_text(text, rows, start.device)

    @property
    def caption_dropout(self) -> float:
        """Probability of dropping a caption."""
        return self.config.distillation.caption_dropout

    def noised(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their times, and the target of the prediction."""
        # On the CPU, so that the numbers do not depend on the device.
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(start),)).to(start.device)
        noise = torch.randn_like(start)
        is_noise = self.scheduler.config.prediction_type == "epsilon"
        target = noise if is_noise else self.scheduler.get_velocity(start, noise, t)
        return self.scheduler.add_noise(start, noise, t), t, target

    def losses(
        self, model: nn.Module, start: Tensor, text: Conditioning, *, epoch: int | None = None
    ) -> dict[str, Tensor]:
        """The distillation loss of each image and its parts; in the first epochs that of separate layers alone."""
        loss = self.config.distillation
        noisy, t, target = self.noised(start)
        dtype = self.distiller.teacher.dtype
        noisy, text = noisy.to(dtype), text.to(dtype)
        if epoch is not None and epoch < loss.block_epochs:
            (attention,) = model(noisy, t, text.states, text.pooled, blocks=True)
            return {"loss": attention}
        student, teacher, attention = model(noisy, t, text.states, text.pooled)
        student = student.float()
        parts = {
            "noise": (student - target).square().flatten(1).mean(1),
            "teacher": (student - teacher.float()).square().flatten(1).mean(1),
            "attention": attention,
        }
        whole = loss.noise * parts["noise"] + loss.teacher * parts["teacher"] + loss.attention * parts["attention"]
        return {"loss": whole, **parts}

    def write(self, weights: dict[str, Tensor], directory: Path) -> None:
        """Write the adapter."""
        with random_state_kept():
            adapter: Any = GSPNAdapter.from_config(self.distiller.adapter.config)
        adapter.load_state_dict({key.removeprefix("adapter."): value for key, value in weights.items()})
        with replaced_directory(directory) as part:
            adapter.save_pretrained(part, safe_serialization=True)

    def draw(self, weights: dict[str, Tensor], context: Context) -> dict[str, list[Image.Image]]:
        """The prompts, drawn by the teacher and by the student."""
        distiller = copy.deepcopy(self.distiller)  # of the adapter alone: the frozen weights are shared
        distiller.load_state_dict(weights)
        distiller.eval()
        if not self._teachers_images:
            self._teachers_images = self.drawn(self.pipeline, context)
        unet = self.pipeline.unet
        self.pipeline.unet = distiller.student
        try:
            students_images = self.drawn(self.pipeline, context)
        finally:
            self.pipeline.unet = unet
            for name in ("vae", "text_encoder", "text_encoder_2"):  # which the training does not need
                model = getattr(self.pipeline, name, None)
                if model is not None:
                    model.to("cpu")
        return {"attention": self._teachers_images, "GSPN": students_images}


def build_adapter(config: DistillConfig, unet: Any) -> GSPNAdapter:
    """The adapter of a configuration, seeded, before its gates are fitted.

    Raises:
        UsageError: the adapter does not fit the UNet.
    """
    model = config.model
    if model.init_from is not None:
        adapter = load_adapter(model.init_from)
        try:
            with copy.deepcopy(adapter).mounted(copy.deepcopy(unet, {id(p): p for p in unet.parameters()})):
                pass
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"model.init_from {model.init_from!r}: {error}") from None
        return nn.Module.float(adapter)  # type: ignore[return-value]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.run.seed, "adapter"))
        try:
            return GSPNAdapter.from_model(
                unet, layers=model.layers, proxy_dim=model.proxy_dim, groups=model.groups,
                segment=model.segments or model.segment, skip=model.skip, proxy_bias=model.proxy_bias,
                copy_projections=model.initialize != "random",
            )  # fmt: skip
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"model: {error}") from None
