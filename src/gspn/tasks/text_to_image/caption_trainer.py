"""The shared part of training a UNet and distilling an adapter: data, held-out loss, and samples during training."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from gspn.diffusers.timesteps import set_timesteps

from ..._console import default_console
from ..._errors import require
from ..core.devices import distributed_context, make_accelerator
from ..core.loop import fit, refuse_existing
from ..core.metrics_table import EpochRow, metric
from ..core.seeding import derived_seed, random_state_kept
from ..core.task import Config, Context, Models, Setup, Task, TrainingResult, Weights
from ..diffusion.digests import fingerprint
from ..diffusion.image_grid import draw_prompts
from ..diffusion.schedulers import check_chain
from .conditioning import Conditioning
from .data import encode_data, read_text


@dataclass(frozen=True)
class CaptionRow(EpochRow):
    """One row of ``metrics.csv``. The losses are None where there is no held-out data or no evaluation."""

    eval_loss: float | None = metric("eval {:.4f}")
    """Mean over the held-out images, at the same times and noise after every epoch."""
    ema_loss: float | None = metric("ema {:.4f}")
    """The same of the averaged weights."""


Row = TypeVar("Row", bound=CaptionRow)


class CaptionTask(Task[Config, Row]):
    """A task on encoded images and captions.

    A subclass opens the pipeline, builds the model, and says how its losses are computed and what is saved and drawn.
    """

    config: Any

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def open_pipeline(self) -> Any:
        """The pipeline that encodes the data and draws, on the CPU; refuses a wrong request before the encoding."""

    @abstractmethod
    def build_model(self, context: Context) -> tuple[nn.Module, str, list[str]]:
        """The model, its title, and notes to print."""

    @property
    @abstractmethod
    def caption_dropout(self) -> float:
        """Probability of dropping a caption."""

    @abstractmethod
    def losses(
        self, model: nn.Module, start: Tensor, text: Conditioning, *, epoch: int | None = None
    ) -> dict[str, Tensor]:
        """The ``loss`` of each image and its parts, ``[B]`` each, with numbers from PyTorch's generators.

        ``start`` are clean latents ``[B, C, h, w]``; ``epoch`` is counted from 0, and None in an evaluation.
        """

    @abstractmethod
    def write(self, weights: dict[str, Tensor], directory: Path) -> None:
        """Write the result into a directory."""

    @abstractmethod
    def draw(self, weights: dict[str, Tensor], context: Context) -> dict[str, list[Image.Image]]:
        """Rows of images by name, one image per prompt, drawn with the weights just written."""

    def train(self, resume: bool, console: Console | None) -> TrainingResult[Row]:
        """Encode the data, train and return the result."""
        require("accelerate", "timm", "torchvision", "safetensors", "yaml")
        require("diffusers", extra="diffusers")
        config, console = self.config, console or default_console()
        # One connection for all: if it were closed and opened again between encoding and training, one process might
        # meet the other's old end.
        with distributed_context():
            make_accelerator(device=config.run.device)
            # A wrong request is refused before hours of encoding.
            self.pipeline = self.open_pipeline()
            check_chain(self.pipeline.scheduler, ("epsilon", "v_prediction"))
            if config.samples.every:
                set_timesteps(_solver(self.pipeline.scheduler), config.samples.steps, as_it_is=True)
            refuse_existing(config.run.output, resume)
            self.unet_fingerprint = fingerprint(self.pipeline.unet)
            cache = config.data.cache or config.run.output / "cache"
            self.data = encode_data(config.data, self.pipeline, cache, device=config.run.device, console=console)
            return fit(self, resume=resume, console=console)

    def setup(self, context: Context) -> Setup:
        """Open the encoded data and build the model."""
        config = self.config
        train, self.held_out = self.data.loaders(
            config.data, accumulate=config.optim.accumulate, seed=config.run.seed, **context.process_info
        )
        model, title, notes = self.build_model(context)
        text, shape = self.data.train.text.index, list(self.data.shape)
        return Setup(
            model=model,
            train=train,
            evaluation=self.held_out,
            model_title=title,
            data_title=f"{self.data.name}: {train.order.images:,} images, {text.rows - 1:,} captions, latents of "
            f"{' x '.join(map(str, shape))}",
            notes=tuple(notes),
            resolved={
                "captions": text.rows - 1,
                "latent_shape": shape,
                **self.data.train.latents.digests,
                "text": text.encoders,
                "unet": self.unet_fingerprint,  # of the weights that existed before: the teacher's, or the pipeline's
            },
        )

    def unfuse_attention(self, unet: Any, context: Context) -> None:
        """Let a UNet that learns in bfloat16 on a CPU compute attention without PyTorch's fused kernel.

        The backward pass of that kernel is 2.7 times as slow there.
        """
        from diffusers.models.attention_processor import AttnProcessor

        if context.accelerator.device.type == "cpu" and self.config.run.precision == "bf16":
            unet.set_attn_processor(AttnProcessor())

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """The mean loss of a batch of posteriors, with some captions dropped."""
        rows = self.data.train.text.sample_rows(targets, self.caption_dropout)
        text = read_text(self.data.train.text, rows, images.device)
        return self.losses(model, self.data.start(images), text, epoch=epoch)["loss"].mean()

    def evaluate(self, models: Models, context: Context) -> dict[str, float | None]:
        """The losses of the held-out images; their parts are those of the averaged weights where they exist."""
        split = self.data.held_out
        if split is None or self.held_out is None:
            return {}

        def losses(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
            text = read_text(split.text, split.text.leading(targets), images.device)
            return self.losses(model, self.data.start(images), text)

        raw = context.mean_metrics(models.raw, self.held_out, losses)
        ema = None if models.ema is None else context.mean_metrics(models.ema, self.held_out, losses)
        parts = {f"eval_{name}": value for name, value in (ema or raw).items() if name != "loss"}
        return {"eval_loss": raw["loss"], "ema_loss": None if ema is None else ema["loss"], **parts}

    def save(self, weights: Weights, row: Row, output: Path, context: Context, *, best: bool) -> Image.Image | None:
        """Write the result; returns a grid of samples when they are due."""
        del best
        self.write(weights.averaged, output / "last")
        if not self.config.samples.due(row.epoch, self.config.schedule.epochs):
            return None
        context.reporter.doing("drawing")
        with random_state_kept():
            return draw_prompts(self.draw(weights.averaged, context), self.prompts())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        _, height, width = self.data.shape
        return height * self.data.pixels, width * self.data.pixels

    def prompts(self) -> list[str]:
        """The prompts that are drawn during training."""
        samples, captions = self.config.samples, self.data.train.captions
        if samples.prompts:
            return list(samples.prompts)
        return [captions[(2 * i + 1) * len(captions) // (2 * samples.number)] for i in range(samples.number)]

    def drawn(self, pipeline: Any, context: Context) -> list[Image.Image]:
        """The prompts, drawn by a pipeline from noise that depends on the run's seed alone."""
        samples, (height, width), prompts = self.config.samples, self.image_size, self.prompts()
        trained = pipeline.scheduler
        pipeline.scheduler = _solver(trained)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(context.accelerator.device)
        images: list[Image.Image] = []
        size = self.config.data.batch_size
        try:
            with context.accelerator.autocast():
                for begin in range(0, len(prompts), size):
                    some = prompts[begin : begin + size]
                    seeds = [derived_seed(self.config.run.seed, "picture", begin + i) for i in range(len(some))]
                    images += pipeline(
                        some, height=height, width=width, num_inference_steps=samples.steps,
                        guidance_scale=samples.guidance,
                        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    ).images  # fmt: skip
        finally:
            pipeline.scheduler = trained
        return images


def _solver(trained: Any) -> Any:
    """The scheduler that draws during training, for a model that was trained with another."""
    return require("diffusers", extra="diffusers").DPMSolverMultistepScheduler.from_config(trained.config)
