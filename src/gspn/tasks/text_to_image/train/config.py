"""The configuration of a text-to-image UNet's training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...._errors import UsageError
from ...core.config import setting
from ...core.sections import Configuration, EmaConfig, ModelExecution, OptimConfig, RunConfig, ScheduleConfig
from ..config import DataConfig, SamplesConfig


@dataclass(frozen=True)
class UNetConfig(ModelExecution):
    """The UNet to train."""

    pipeline: str | None = None
    """A text-to-image pipeline, by path, hub id or name, whose UNet is trained further; its other parts are kept."""
    vae: str | None = None
    """Without a pipeline: an ``AutoencoderKL``, by path or hub id."""
    text: str = "minilm"
    """Without a pipeline: `minilm` (:func:`~.pipelines.minilm`), or a pipeline whose text encoder is used."""
    options: dict[str, Any] = field(default_factory=dict)
    """Without a pipeline: arguments of ``UNet2DConditionModel``."""


@dataclass(frozen=True)
class NoiseConfig:
    """The noise, on Stable Diffusion's chain of steps, and what the UNet predicts."""

    objective: Literal["epsilon", "v_prediction"] = "epsilon"
    timesteps: int = setting(1000, 2, 1_000_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = setting(0.00085, above=0, below=1)
    beta_end: float = setting(0.012, above=0, below=1)
    caption_dropout: float = setting(0.1, 0, 1)
    """Probability of dropping a caption, for classifier-free guidance."""


@dataclass(frozen=True)
class TextToImageConfig(Configuration):
    """The configuration of a text-to-image UNet's training run.

    Args: the sections below, each a dataclass with a default for every key.

    Raises:
        UsageError: a value out of range, or two that exclude each other.

    Example:
        >>> TextToImageConfig.load("emoji64").data.size
        64
    """

    PRESETS: ClassVar[str] = "gspn.tasks.text_to_image.train.presets"
    RENAMED: ClassVar[Mapping[str, str]] = {"pictures": "samples"}

    data: DataConfig = DataConfig()
    model: UNetConfig = UNetConfig()
    noise: NoiseConfig = NoiseConfig()
    samples: SamplesConfig = SamplesConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(epochs=100)
    ema: EmaConfig = EmaConfig(decay=0.9999)
    run: RunConfig = RunConfig(output=Path("runs/t2i"))

    def __post_init__(self) -> None:
        super().__post_init__()
        model, noise = self.model, self.noise
        if not 0 < noise.beta_start < noise.beta_end < 1:
            raise UsageError(
                f"noise.beta_start is {noise.beta_start:g} and noise.beta_end {noise.beta_end:g}; they have to rise, "
                "between 0 and 1."
            )
        if model.pipeline is not None and (model.vae is not None or model.options):
            raise UsageError(
                f"model.pipeline is {model.pipeline!r}, which has an autoencoder and a UNet; leave model.vae and "
                "model.options out."
            )
