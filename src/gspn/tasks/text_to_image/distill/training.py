"""Distilling an adapter from a text-to-image pipeline: :func:`distill`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from gspn.diffusers import GSPNAdapter

from ...._files import replaced_directory
from ...core.devices import make_accelerator
from ...core.errors import UsageError, require
from ...core.loop import connected, refuse_existing, to_device
from ...core.seeding import derived_seed, random_state_kept, seed_everything
from ..caption_trainer import CaptionRow, CaptionRun
from ..conditioning import Conditioning
from ..config import DistillConfig
from ..data import EncodedData, encode_data, read_text
from ..denoising import check_chain
from ..pipelines import load_adapter, load_pipeline
from .attention_matching import Distiller
from .initialization import fit_gates

# Images that the gates are fitted on, and how many at a time.
_FITTED_ON, _FITTED_AT_ONCE = 32, 8

_WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DistillRow(CaptionRow):
    """One row of ``metrics.csv``; the parts of the held-out loss, of the averaged weights where there are any."""

    eval_noise: float | None = None
    """Squared error against the noise, or what else the teacher predicts."""
    eval_teacher: float | None = None
    """Against the teacher's prediction."""
    eval_attention: float | None = None
    """Of the attentions' outputs, a mean over the layers."""


@dataclass(frozen=True)
class DistillResult:
    """What a run came to.

    Attributes:
        output: The run's directory: ``config.yaml``, ``metrics.csv``, ``last``, ``samples``, ``checkpoints``.
        last: The last row of the table.
        is_main: Whether this is the process that writes and prints.
    """

    output: Path
    last: DistillRow | None
    is_main: bool = True


def distill(config: DistillConfig, *, resume: bool = False, console: Console | None = None) -> DistillResult:
    r"""Train an adapter so that a text-to-image pipeline draws with it as it draws with its self-attention.

    Teacher and student are one UNet, with attention and with GSPN in its place; only the adapter is trained. For noisy
    latents :math:`x_t` with the caption c, the loss is that of GSPN (arXiv 2501.12381):

    .. math:: \|\epsilon_s - \epsilon\|^2 + \tfrac12 \|\epsilon_s - \epsilon_t\|^2
              + \tfrac12 \operatorname{mean}_l \|a_{s,l} - a_{t,l}\|^2

    where :math:`\epsilon_s, \epsilon_t` are what student and teacher predict, :math:`\epsilon` the noise (or the
    velocity, for a teacher that predicts that), :math:`a_l` the output of the attention l and of the mixer in its
    place, and all squares are means over their numbers. In the first ``distillation.block_epochs`` epochs each mixer
    alone learns :math:`a_{t,l}` from what the attention l was given, which runs no student and costs a forward pass of
    the teacher.

    Latents and captions are encoded first, once, into ``data.cache``. Then as every training run here: in one process
    or several, on accelerate, killed and resumed to the same weights. The output directory receives ``config.yaml``,
    ``metrics.csv`` (a :class:`DistillRow` an epoch), ``samples/`` (teacher and student, from the same noise) and in
    ``last/`` the adapter, :class:`gspn.diffusers.GSPNAdapter`, with the average of the weights where one is kept.

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
        >>> from gspn.tasks.text_to_image.config import DistillConfig
        >>> from gspn.tasks.text_to_image.distill import distill
        >>> distill(DistillConfig.load("emoji64").changed("schedule.epochs=1"))  # doctest: +SKIP
    """
    require("accelerate", "timm", "torchvision", "safetensors", "yaml")
    require("diffusers", extra="diffusers")
    if config.run.fsdp:
        raise UsageError(
            "run.fsdp is true, and an adapter is small: its teacher is whole in every process. Set run.fsdp=false."
        )
    return connected(lambda: _distill(config, resume, console or Console()))


def _distill(config: DistillConfig, resume: bool, console: Console) -> DistillResult:
    # Processes connect once: closed and opened again between encoding and training, one may find the other's old end.
    make_accelerator(device=config.run.device)
    pipeline = load_pipeline(config.teacher)
    # What is wrong is said before hours of encoding.
    check_chain(pipeline.scheduler, ("epsilon", "v_prediction"))
    refuse_existing(config.run.output, resume)
    build_adapter(config, pipeline.unet)
    cache = config.data.cache or config.run.output / "cache"
    data = encode_data(config.data, pipeline, cache, device=config.run.device, console=console)
    return _DistillRun(config, pipeline, data, resume, console).fit()


def build_adapter(config: DistillConfig, unet: Any) -> GSPNAdapter:
    """The adapter of a configuration, seeded, before its gates are fitted.

    Raises:
        UsageError: it does not fit the UNet.
    """
    model = config.model
    if model.resume_from is not None:
        adapter = load_adapter(model.resume_from)
        try:
            with copy.deepcopy(adapter).mounted(copy.deepcopy(unet, {id(p): p for p in unet.parameters()})):
                pass
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"model.resume_from {model.resume_from!r}: {error}") from None
        return nn.Module.float(adapter)  # type: ignore[return-value]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.run.seed, "adapter"))
        try:
            return GSPNAdapter.from_model(
                unet,
                layers=model.layers,
                proxy_dim=model.proxy_dim,
                groups=model.groups,
                segment=model.segments or model.segment,
                skip=model.skip,
                proxy_bias=model.proxy_bias,
                copy_projections=model.initialize != "random",
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"model: {error}") from None


class _DistillRun(CaptionRun):
    row = DistillRow

    def __init__(self, config: DistillConfig, pipeline: Any, data: EncodedData, resume: bool, console: Console) -> None:
        self._teachers: list[Image.Image] = []
        self.explained: dict[str, float] = {}
        super().__init__(config, pipeline, data, resume, console)

    def _open(self, config: DistillConfig) -> nn.Module:
        self._open_loaders(config)
        diffusers = require("diffusers", extra="diffusers")
        self.noise = diffusers.DDPMScheduler.from_config(self.pipeline.scheduler.config)
        teacher = nn.Module.to(self.pipeline.unet, _WEIGHTS[config.model.weights])
        adapter = build_adapter(config, teacher)
        distiller = Distiller(teacher, adapter, *self.image_size, relative=config.distillation.relative)
        distiller.place(self.accelerator.device, channels_last=config.model.channels_last)
        if config.model.initialize == "fit" and config.model.resume_from is None:
            batches = list(self._first_batches(config))  # reading files is nothing for autocast
            with self.accelerator.autocast():
                self.explained = fit_gates(distiller, batches)
        if config.model.grad_checkpointing:
            distiller.student.enable_gradient_checkpointing()
        return distiller

    def _first_batches(self, config: DistillConfig) -> Iterator[tuple[Tensor, Tensor, Conditioning]]:
        """Some training images with noise, the same in every process and whenever the run is resumed."""
        seed_everything(derived_seed(config.run.seed, "fit"))
        latents, text, device = self.data.train.latents, self.data.train.text, self.accelerator.device
        picked = torch.randperm(len(latents))[:_FITTED_ON]
        for some in picked.split(_FITTED_AT_ONCE):
            posterior, places = zip(*(latents[i] for i in some.tolist()), strict=True)
            start = to_device(torch.stack(posterior), device, config.model.channels_last)
            rows = text.drawn(torch.tensor(places), config.distillation.caption_dropout)
            noisy, t, _ = self._noised(self.data.start(start))
            yield noisy, t, read_text(text, rows, device)

    def _announcement(self) -> list[str]:
        network: Any = self.network
        what = (
            f"adapter of {len(network.adapter.mixers)} layers, {self.config.resolved.parameters / 1e6:.2f} M parameters"
        )
        lines = [f"{what}, to {self.config.teacher}, on {self._place()}", self._data_line()]
        if self.explained:
            mean = sum(self.explained.values()) / len(self.explained)
            lines.append(f"constant gates explain {100 * mean:.0f} % of what attention makes, a mean over the layers")
        return lines

    def fit(self) -> DistillResult:
        """Train, and say what came of it."""
        self.run()
        return DistillResult(self.output, self.table.last(), self.main)  # type: ignore[arg-type]

    def _begin(self, epoch: int) -> None:
        self._blocks = epoch < self.config.distillation.block_epochs

    def _dropout(self) -> float:
        return self.config.distillation.caption_dropout

    def _noised(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their times, and what a perfect prediction is."""
        # On the CPU, so that the same are drawn wherever the model runs.
        t = torch.randint(0, self.noise.config.num_train_timesteps, (len(start),)).to(start.device)
        noise = torch.randn_like(start)
        noisy = self.noise.add_noise(start, noise, t)
        is_noise = self.noise.config.prediction_type == "epsilon"
        return noisy, t, noise if is_noise else self.noise.get_velocity(start, noise, t)

    def _losses(self, model: nn.Module, start: Tensor, text: Conditioning) -> dict[str, Tensor]:
        loss = self.config.distillation
        noisy, t, aim = self._noised(start)
        noisy = noisy.to(self.network.teacher.dtype)  # type: ignore[union-attr]
        text = text.to(noisy.dtype)
        if model.training and self._blocks:
            (attention,) = model(noisy, t, text.states, text.pooled, blocks=True)
            return {"loss": attention}
        prediction, guess, attention = model(noisy, t, text.states, text.pooled)
        prediction = prediction.float()
        parts = {
            "noise": (prediction - aim).square().flatten(1).mean(1),
            "teacher": (prediction - guess.float()).square().flatten(1).mean(1),
            "attention": attention,
        }
        whole = loss.noise * parts["noise"] + loss.teacher * parts["teacher"] + loss.attention * parts["attention"]
        return {"loss": whole, **parts}

    def _write(self, weights: Any) -> None:
        network: Any = self.network
        with random_state_kept():
            saved: Any = GSPNAdapter.from_config(network.adapter.config)
        own = {key.removeprefix("adapter."): value.cpu() for key, value in weights.items()}
        saved.load_state_dict(own)
        with replaced_directory(self.output / "last") as part:
            saved.save_pretrained(part, safe_serialization=True)

    def _draw(self, epoch: int, step: int) -> None:
        distiller: Any = self.network if self.ema is None else self._averaged()
        if not self._teachers:
            self._teachers = self.drawn(self.pipeline)
        unet = self.pipeline.unet
        self.pipeline.unet = distiller.student
        try:
            students = self.drawn(self.pipeline)
        finally:
            self.pipeline.unet = unet
            for name in ("vae", "text_encoder", "text_encoder_2"):  # which the training does not need
                model = getattr(self.pipeline, name, None)
                if model is not None:
                    model.to("cpu")
        self.save_sheet(epoch, step, {"attention": self._teachers, "GSPN": students})
