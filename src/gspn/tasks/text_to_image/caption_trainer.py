"""What training a UNet and distilling an adapter share: batches, the held-out loss, and images on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..._files import replaced
from ..core.errors import UsageError, require
from ..core.loop import Position, TrainingRun, to_device
from ..core.records import EpochRow
from ..core.sections import Resolved
from ..core.seeding import derived_seed, random_state_kept, seed_everything
from ..diffusion.image_grid import draw_sheet
from .conditioning import Conditioning
from .config import ResolvedTextToImage
from .data import EncodedData, EncodedSplit, read_text
from .sample.stage_cache import fingerprint


@dataclass(frozen=True)
class CaptionRow(EpochRow):
    """One row of ``metrics.csv``; the held-out losses are None where there is nothing held out."""

    eval_loss: float | None
    """Mean over the held-out images, at times and noise that are the same after every epoch."""
    ema_loss: float | None
    """Likewise, of the averaged weights."""


class CaptionRun(TrainingRun[CaptionRow, Position]):
    """A run over encoded images and captions; a task derives from it and says what the loss of a batch is.

    Args:
        config: The task's configuration.
        pipeline: On the CPU, whose UNet is trained or is the teacher.
        data: Encoded.
        resume: Continue from the newest whole checkpoint.
        console: Where to print.
    """

    row = CaptionRow

    def __init__(self, config: Any, pipeline: Any, data: EncodedData, resume: bool, console: Console) -> None:
        self.pipeline = pipeline
        self.data = data
        self._mark = fingerprint(pipeline.unet)
        super().__init__(config, resume, console)

    def _open_loaders(self, config: Any) -> None:
        self.train_loader, self.held_out = self.data.loaders(
            config.data, accumulate=config.optim.accumulate, seed=config.run.seed, **self.places
        )

    def _classes(self) -> int:
        return 0

    def _resolve(self, config: Any, network: nn.Module, shared: Resolved) -> ResolvedTextToImage:
        del config, network
        text = self.data.train.text.index
        return ResolvedTextToImage(
            **asdict(shared),
            captions=text.rows - 1,
            latent_shape=list(self.data.shape),
            latents=self.data.train.latents.digest,
            text=text.encoders,
            unet=self._mark,
        )

    def _data_line(self) -> str:
        resolved = self.config.resolved
        shape = " x ".join(map(str, resolved.latent_shape))
        return f"{self.data.name}: {resolved.train_images:,} images, {resolved.captions:,} captions, latents of {shape}"

    # --- The loss -----------------------------------------------------------------------------------------------------

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        _, height, width = self.data.shape
        return height * self.data.pixels, width * self.data.pixels

    def _losses(self, model: nn.Module, start: Tensor, text: Conditioning) -> dict[str, Tensor]:
        """``loss``, and its parts, of each of ``start`` ``[B, C, h, w]``, ``[B]``; draws from PyTorch's generators."""
        raise NotImplementedError

    def _dropout(self) -> float:
        """Probability of leaving a caption out."""
        raise NotImplementedError

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        rows = self.data.train.text.drawn(targets, self._dropout())
        text = read_text(self.data.train.text, rows, self.accelerator.device)
        return self._losses(self.model, self.data.start(images), text)["loss"].mean()

    @torch.no_grad()
    def _held_out_losses(self, model: nn.Module, split: EncodedSplit) -> dict[str, float]:
        training = model.training
        model.eval()
        sums: dict[str, float] = {}
        with random_state_kept():
            for i, (images, targets) in enumerate(self.held_out or ()):
                seed_everything(derived_seed(self.config.run.seed, "eval", i, self.accelerator.process_index))
                images = to_device(images, self.accelerator.device, self.config.model.channels_last)
                counts = targets >= 0
                text = read_text(split.text, split.text.leading(targets.clamp(min=0)), self.accelerator.device)
                with self.accelerator.autocast():
                    found = self._losses(model, self.data.start(images), text)
                found = {"count": torch.ones(len(targets)), **found}
                for name, each in found.items():
                    sums[name] = sums.get(name, 0.0) + each.cpu().double()[counts].sum().item()
        model.train(training)
        values = self._summed(torch.tensor(list(sums.values()), dtype=torch.float64))
        whole = dict(zip(sums, values, strict=True))
        return {name: value / max(whole["count"], 1) for name, value in whole.items() if name != "count"}

    def _finish(self, shared: dict[str, Any], last: bool) -> tuple[CaptionRow, list[str], bool]:
        epoch = shared["epoch"]
        raw, ema = {}, {}
        if self.data.held_out is not None and (last or epoch % self.config.run.eval_every == 0):
            self.reporter.doing("evaluating", epoch - 1)
            raw = self._held_out_losses(self.model, self.data.held_out)
            ema = {} if self.ema is None else self._held_out_losses(self._averaged(), self.data.held_out)
        parts = {f"eval_{name}": value for name, value in (ema or raw).items() if name != "loss"}
        row = self.row(**shared, eval_loss=raw.get("loss"), ema_loss=ema.get("loss"), **parts)
        found = [f"{name} {one['loss']:.4f}" for name, one in (("eval", raw), ("ema", ema)) if one]
        weights = self.weights()
        if self.main:
            self._write(weights.get("ema", weights["raw"]))
            every = self.config.samples.every
            if every and (last or epoch % every == 0):
                self.reporter.doing("drawing", epoch - 1)
                with random_state_kept():
                    self._draw(epoch, row.step)
        return row, found, False

    def _averaged(self) -> nn.Module:
        """The module of the averaged weights, that the loss can be taken of."""
        if self.ema is None:
            raise UsageError("no average is kept; set ema.decay.")
        return self.ema.module

    def _write(self, weights: Any) -> None:
        """Write what the run gives into ``last/``."""
        raise NotImplementedError

    # --- Images -----------------------------------------------------------------------------------------------------

    def _draw(self, epoch: int, step: int) -> None:
        """Draw images of the weights just written."""
        raise NotImplementedError

    def prompts(self) -> list[str]:
        """What is drawn on the way."""
        samples = self.config.samples
        if samples.prompts:
            return list(samples.prompts)
        captions = self.data.train.captions
        return [captions[(2 * i + 1) * len(captions) // (2 * samples.number)] for i in range(samples.number)]

    def drawn(self, pipeline: Any) -> list[Image.Image]:
        """The prompts, drawn by a pipeline from noise that depends on the run's seed alone."""
        samples, (height, width) = self.config.samples, self.image_size
        prompts = self.prompts()
        trained = pipeline.scheduler
        solver = require("diffusers", extra="diffusers").DPMSolverMultistepScheduler
        pipeline.scheduler = solver.from_config(trained.config)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.accelerator.device)
        found: list[Image.Image] = []
        try:
            with self.accelerator.autocast():
                for begin in range(0, len(prompts), self.config.data.batch_size):
                    some = prompts[begin : begin + self.config.data.batch_size]
                    seeds = [derived_seed(self.config.run.seed, "picture", begin + i) for i in range(len(some))]
                    found += pipeline(
                        some,
                        height=height,
                        width=width,
                        num_inference_steps=samples.steps,
                        guidance_scale=samples.guidance,
                        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    ).images
        finally:
            pipeline.scheduler = trained
        return found

    def save_sheet(self, epoch: int, step: int, rows: dict[str, list[Image.Image]]) -> None:
        """Rows of images, one for each of the prompts, with their names."""
        sheet = draw_sheet(rows, self.prompts())
        with replaced(self.output / "samples" / f"epoch-{epoch:05d}.png") as part:
            sheet.save(part, format="PNG")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
