"""The configuration of a class-conditional denoiser's training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..._errors import UsageError
from ..core import sections
from ..core.config import setting
from ..core.sections import Configuration, EmaConfig, ImageData, ModelExecution, OptimConfig, RunConfig, ScheduleConfig
from ..diffusion.config import DiffusionConfig

DenoiserName = Literal["gspn", "attention", "dit"]


@dataclass(frozen=True)
class DataConfig(ImageData):
    """The images, or latents, to learn from."""

    size: int = setting(32, 1, 65536)
    """Height and width of an image in pixels; smaller images are enlarged, others cropped at the centre."""
    latents: Path | None = setting(None, free=True)  # a digest of them is compared, under `resolved`
    """A directory written by `gspn class-conditional latents`: the model then learns latents, not pixels. It determines
    `name`, `train_split` and `size`, which are left out or equal to it; `eval_split` is a directory of latents, too.
    Those of other `sizes` are in directories beside it, called like it with `-SIZE` at the end."""
    channels: Literal[1, 3] = 3
    """1: convert images to grey."""
    hflip: float = setting(0.0, 0, 1)
    """Probability of mirroring an image; for latents, if the mirrored images were encoded, too."""


@dataclass(frozen=True)
class ModelConfig(ModelExecution):
    """The denoiser."""

    name: DenoiserName = "gspn"
    """`gspn`: :class:`gspn.models.GSPNDenoiser2DModel`; `attention`: the same with self-attention; `dit`: diffusers'
    ``DiTTransformer2DModel``."""
    size: str = "T/2"
    """`T`, `S`, `B`, `L` or `XL`, a slash, and the side of a patch; DiT's own sizes for `dit`."""
    class_dropout: float = setting(0.1, 0, 1)
    """Probability of dropping a label, for classifier-free guidance."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model."""
    init_from: str | None = None
    """A pipeline to continue from, by path, hub id or name: its weights, in the model of the settings above. Options
    without weights, such as ``scan.reference_lines``, may differ from those of the pipeline."""


@dataclass(frozen=True)
class SamplesConfig(sections.SamplesConfig):
    """The images drawn during training, always from the same noise."""

    columns: int = setting(8, 1)
    """Images of each class."""
    classes: int = setting(10, 1)
    """Number of classes drawn, evenly spread over all."""
    scheduler: str = "auto"
    """The scheduler's name in :mod:`gspn.tasks.diffusion.schedulers`."""


@dataclass(frozen=True)
class ClassConditionalConfig(Configuration):
    """The configuration of a class-conditional denoiser's training run.

    Raises:
        UsageError: a value out of range, or two that exclude each other.

    Example:
        >>> config = ClassConditionalConfig(data=DataConfig(name="digits", channels=1))
        >>> config.changed("diffusion.objective=flow", "diffusion.learned_sigma=false").diffusion.objective
        'flow'
        >>> ClassConditionalConfig.load("mnist5k").data.size
        28
    """

    PRESETS: ClassVar[str] = "gspn.tasks.class_conditional.presets"
    RENAMED: ClassVar[Mapping[str, str]] = {"model.network": "model.name", "samples.sampler": "samples.scheduler"}

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    samples: SamplesConfig = SamplesConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(epochs=100)
    ema: EmaConfig = EmaConfig(decay=0.9999)
    run: RunConfig = RunConfig(output=Path("runs/class_conditional"))

    def __post_init__(self) -> None:
        super().__post_init__()
        data, diffusion = self.data, self.diffusion
        if diffusion.learned_sigma and diffusion.objective != "epsilon":
            raise UsageError(
                f"diffusion.learned_sigma is true and diffusion.objective {diffusion.objective!r}: the variational "
                "bound needs the prediction of noise. Set diffusion.learned_sigma=false, or "
                "diffusion.objective=epsilon."
            )
        if data.latents is None and diffusion.scaling != 1:
            raise UsageError(
                f"diffusion.scaling is {diffusion.scaling:g}, and only latents are scaled; set diffusion.scaling=1, or "
                "data.latents."
            )
        for key, default, written in (("root", None, "null"), ("options", {}, "{}"), ("channels", 3, "3")):
            value = getattr(data, key)
            if data.latents is not None and value != default:
                shown = str(value) if isinstance(value, Path) else value
                raise UsageError(
                    f"data.{key} is {shown!r}, and data.latents is set, which needs no images; set "
                    f"data.{key}={written}."
                )
