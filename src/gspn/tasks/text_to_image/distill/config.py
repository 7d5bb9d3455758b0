"""The configuration of a distillation run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ...._errors import UsageError
from ...core.config import setting
from ...core.sections import Configuration, EmaConfig, MixerConfig, OptimConfig, RunConfig, ScheduleConfig
from ..config import DataConfig, SamplesConfig


@dataclass(frozen=True)
class AdapterConfig(MixerConfig):
    """The student: the teacher's UNet with GSPN in place of its self-attention. ``compile`` compiles both."""

    layers: list[str] | None = None
    """Levels or names of modules; null: all. See :meth:`gspn.diffusers.GSPNAdapter.from_model`."""
    segments: dict[str, int | None] = field(default_factory=dict, metadata={"range": (1,)})
    """Segments by level, instead of ``segment``."""
    init_from: str | None = None
    """An adapter to continue from, by path, hub id or name; replaces all settings of the mixers."""
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The dtype of the teacher's frozen weights. The adapter's are fp32, so a lower one needs a lower
    ``run.precision``, too."""


@dataclass(frozen=True)
class DistillationConfig:
    """The weights of the loss's terms, and the epochs in which each layer learns separately."""

    noise: float = setting(1.0, 0)
    """Weight of the squared error against the noise, or whatever the teacher predicts."""
    teacher: float = setting(0.5, 0)
    """Weight of the squared error against the teacher's prediction."""
    attention: float = setting(0.5, 0)
    """Weight of the squared error against the attentions' outputs, a mean over the layers."""
    relative: bool = False
    """Divide each layer's error by the mean square of the attention's output, so that all layers count equally."""
    layers: list[str] | None = None
    """Levels or names of modules whose mixers learn, the others staying as ``model.init_from`` has them; null: all."""
    caption_dropout: float = setting(0.1, 0, 1)
    """Probability of dropping a caption, as classifier-free guidance does."""
    block_epochs: int = setting(0, 0)
    """Epochs at the start in which every layer separately learns the attention's output from the attention's own
    input."""


@dataclass(frozen=True)
class DistillConfig(Configuration):
    """The configuration of a distillation run.

    Args: the sections below, each a dataclass with a default for every key.

    Raises:
        UsageError: a value out of range, or two that exclude each other.

    Example:
        >>> DistillConfig.load("emoji64").distillation.attention
        0.5
    """

    PRESETS: ClassVar[str] = "gspn.tasks.text_to_image.distill.presets"
    RENAMED: ClassVar[Mapping[str, str]] = {"pictures": "samples", "model.resume_from": "model.init_from"}

    teacher: str = "gspn_text_to_image.emoji"
    """A text-to-image pipeline, by path, hub id or name."""
    data: DataConfig = DataConfig()
    model: AdapterConfig = AdapterConfig()
    distillation: DistillationConfig = DistillationConfig()
    samples: SamplesConfig = SamplesConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(epochs=20)
    ema: EmaConfig = EmaConfig(decay=0.999)
    run: RunConfig = RunConfig(output=Path("runs/distill"))

    def __post_init__(self) -> None:
        if self.run.fsdp:
            raise UsageError("FSDP is not supported for distillation; set run.fsdp=false (DDP).")
        super().__post_init__()
        model, loss = self.model, self.distillation
        if loss.noise == loss.teacher == loss.attention == 0:
            raise UsageError("distillation.noise, .teacher and .attention are all 0: nothing is learnt; set one above.")
        if loss.block_epochs > self.schedule.epochs:
            raise UsageError(
                f"distillation.block_epochs is {loss.block_epochs}, more than schedule.epochs {self.schedule.epochs}, "
                "which includes them; lower it."
            )
        model.check_start()
        if model.weights != "fp32" and self.run.precision == "fp32":
            raise UsageError(
                f"model.weights is {model.weights!r} and run.precision 'fp32': the adapter's fp32 weights beside them "
                f"need autocast. Set run.precision={model.weights}, or model.weights=fp32."
            )
        if model.segment is not None and model.segments:
            raise UsageError(
                f"model.segment is {model.segment} and model.segments {model.segments}; set only one of them."
            )
