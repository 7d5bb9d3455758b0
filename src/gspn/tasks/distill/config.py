"""The configuration of a distillation run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..._errors import UsageError
from ..classify.config import AugmentConfig
from ..core.config import setting
from ..core.sections import Configuration, EmaConfig, ImageData, MixerConfig, OptimConfig, RunConfig, ScheduleConfig


@dataclass(frozen=True)
class DataConfig(ImageData):
    """The images. Labels are not used for training; where they are the teacher's classes, accuracies are measured."""

    size: int = setting(224, 1, 65536)
    """Height and width of the student's input in pixels."""
    maps: bool | None = None
    """Whether the images are those of a data set of `gspn dense train`, such as `earth`; no map is read. false: one of
    `gspn classify train`, or a folder of images alone. null: as the teacher was trained."""


@dataclass(frozen=True)
class AdapterConfig(MixerConfig):
    """The student: the teacher with GSPN in place of its self-attention. ``compile`` compiles both."""

    channels_last: bool = False
    keep_attention: list[int] = field(default_factory=list)
    """Blocks that keep their attention, by index; negative ones count from the end."""
    latent_dim: int | None = setting(None, 1)
    """Channels that are scanned, as in C-GSPN; null: all."""
    init_from: str | None = None
    """The run whose student to continue from, or a directory of its adapter; replaces all settings of the mixers."""


@dataclass(frozen=True)
class DistillationConfig:
    """The stages, and the weights of the second stage's loss.

    All squared errors of tokens are divided by the mean square of the teacher's.
    """

    block_epochs: int = setting(0, 0)
    """Epochs of the first stage, in which every mixer separately learns the attention's output from the attention's own
    input; the rest of ``schedule.epochs`` is the second stage, end to end."""
    propagation: float = setting(0.5, 0)
    """Weight of the squared error of the mixers' outputs, a mean over the layers."""
    blocks: float = setting(0.5, 0)
    """Weight of the squared error of the outputs of their blocks, a mean over the layers."""
    features: float = setting(1.0, 0)
    """Weight of the squared error of the model's last tokens."""
    logits: float = setting(1.0, 0)
    """Weight of the divergence from the teacher's class probabilities, for a teacher that is a classifier."""
    temperature: float = setting(1.0, above=0)
    """Divides the logits of both before the divergence, which is multiplied by its square."""
    teacher_size: int | None = setting(None, 1, 65536)
    """Height and width of the images that the teacher sees, when they are smaller than the student's; all that is
    compared is enlarged to the student's map. null: ``data.size``."""


@dataclass(frozen=True)
class DistillConfig(Configuration):
    """The configuration of a distillation run.

    Args: the sections below, each a dataclass with a default for every key.

    Raises:
        UsageError: a value out of range, or two that exclude each other.

    Example:
        >>> from gspn.tasks.distill import DistillConfig
        >>> DistillConfig.load("emoji_vit").model.latent_dim
        64
    """

    PRESETS: ClassVar[str] = "gspn.tasks.distill.presets"

    teacher: str = "vit_base_patch16_224"
    """A vision transformer: a timm model with weights, a directory that ``gspn classify train`` wrote, an id of the
    hub; one that ``gspn dense train`` wrote, whose encoder is taken; or the directory of a distillation run, whose
    student teaches."""
    data: DataConfig = DataConfig()
    model: AdapterConfig = AdapterConfig()
    augment: AugmentConfig = AugmentConfig()
    distillation: DistillationConfig = DistillationConfig()
    optim: OptimConfig = OptimConfig(lr=1e-3, lr_base_batch=None, weight_decay=0.0, clip_grad=1.0)
    schedule: ScheduleConfig = ScheduleConfig(epochs=20)
    ema: EmaConfig = EmaConfig()
    run: RunConfig = RunConfig(output=Path("runs/distill_vit"))

    def __post_init__(self) -> None:
        if self.run.fsdp:
            raise UsageError("FSDP is not supported for distillation; set run.fsdp=false (DDP).")
        super().__post_init__()
        loss, data = self.distillation, self.data
        if data.sizes is not None:
            raise UsageError(
                f"data.sizes is {data.sizes}; a student learns at one size at a time. Set data.size, and go on at "
                "another one with the run as model.init_from."
            )
        end_to_end = loss.propagation + loss.blocks + loss.features + loss.logits > 0
        if not end_to_end and loss.block_epochs < self.schedule.epochs:
            raise UsageError(
                "distillation.propagation, .blocks, .features and .logits are all 0: nothing is learnt end to end; set "
                "one above, or distillation.block_epochs to schedule.epochs."
            )
        if loss.block_epochs > self.schedule.epochs:
            raise UsageError(
                f"distillation.block_epochs is {loss.block_epochs}, more than schedule.epochs {self.schedule.epochs}, "
                "which includes them; lower it."
            )
        if loss.teacher_size is not None and loss.teacher_size > data.size:
            raise UsageError(
                f"distillation.teacher_size is {loss.teacher_size}, more than data.size {data.size}: only the student "
                "may see larger images; lower it."
            )
        if self.augment.mixup or self.augment.cutmix:
            raise UsageError(
                f"augment.mixup is {self.augment.mixup:g} and augment.cutmix {self.augment.cutmix:g}; they mix labels, "
                "which distillation does not use. Set both to 0."
            )
        self.model.check_start()
