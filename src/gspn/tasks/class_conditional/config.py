"""The configuration of a generative model's training run: what a preset says, and what is saved beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..core.config import check_range
from ..core.errors import UsageError
from ..core.sections import (
    Configuration,
    EmaConfig,
    OptimConfig,
    Resolved,
    RunConfig,
    ScheduleConfig,
    check_training,
)
from ..diffusion.config import DiffusionConfig

Network = Literal["gspn", "attention", "dit"]


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from."""

    name: str = "mnist5k"
    """`emoji`, `digits`, `mnist5k`, `folder`, ...: what :func:`gspn.data.open_dataset` opens."""
    root: Path | None = None
    """Where the data lie, for those that do not come with the package."""
    latents: Path | None = None
    """A directory that `gspn class-conditional latents` wrote: the model then learns latents and not pixels. It says what they
    are of: `name`, `train_split` and `size` are left out or say the same."""
    train_split: str = "train"
    eval_split: str | None = None
    """Images, or a directory of latents, whose loss is measured after every epoch; null for none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of :func:`gspn.data.open_dataset`."""
    size: int = 32
    """Height and width of an image; smaller ones are enlarged, others cropped at the middle."""
    channels: Literal[1, 3] = 3
    """1: images become grey."""
    hflip: float = 0.0
    """Probability of mirroring an image; of latents, if the mirrored images were encoded too."""
    batch_size: int = 64
    """Images in one forward pass of one process."""
    workers: int = 4
    """Processes that load images, for each training process; 0 loads in the training process."""


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser."""

    network: Network = "gspn"
    """`gspn`: :class:`gspn.models.GSPNDenoiser2DModel`; `attention`: its twin with self-attention; `dit`: diffusers'
    ``DiTTransformer2DModel``."""
    size: str = "T/2"
    """`T`, `S`, `B`, `L` or `XL`, a slash, and the side of a patch; DiT's own sizes for `dit`."""
    class_dropout: float = 0.1
    """Probability of leaving a label out, for classifier-free guidance."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the network."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = True
    compile: bool = False
    """``torch.compile`` the network."""


@dataclass(frozen=True)
class SamplesConfig:
    """The images that are drawn as the model learns, always from the same noise."""

    every: int = 5
    """Epochs between them; after the last in any case. 0: none."""
    columns: int = 8
    """Images of each class."""
    classes: int = 10
    """Classes, evenly spread over all."""
    steps: int = 50
    guidance: float = 2.0
    sampler: str = "auto"
    """One of :data:`~gspn.tasks.diffusion.schedulers.SCHEDULERS`."""


@dataclass(frozen=True)
class ResolvedGenerator(Resolved):
    """What follows from the rest; computed anew in each run, and never read."""

    in_channels: int
    out_channels: int
    sample_size: int
    latents: str | None = None
    """A digest of the latents."""


@dataclass(frozen=True)
class GenerateConfig(Configuration):
    """A whole training run of a generative model.

    Args: the sections below, each a dataclass of its own with a default for every key.

    Raises:
        UsageError: a value out of its range, or two that exclude each other.

    Example:
        >>> config = GenerateConfig(data=DataConfig(name="digits", channels=1))
        >>> config.changed("diffusion.objective=flow", "diffusion.learned_sigma=false").diffusion.objective
        'flow'
        >>> GenerateConfig.load("mnist5k").data.size
        28
    """

    PRESETS: ClassVar[str] = "gspn.tasks.class_conditional.presets"

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(epochs=100))
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.9999))
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/generate")))
    resolved: ResolvedGenerator | None = None

    def __post_init__(self) -> None:
        check_training(self.optim, self.schedule, self.ema, self.run)
        data, diffusion, samples = self.data, self.diffusion, self.samples
        for place, value, least in (
            ("data.size", data.size, 1),
            ("data.batch_size", data.batch_size, 1),
            ("data.workers", data.workers, 0),
            ("diffusion.timesteps", diffusion.timesteps, 2),
            ("samples.every", samples.every, 0),
            ("samples.columns", samples.columns, 1),
            ("samples.classes", samples.classes, 1),
            ("samples.steps", samples.steps, 1),
            ("samples.guidance", samples.guidance, 0),
        ):
            check_range(place, value, least)
        check_range("data.hflip", data.hflip, 0, 1)
        check_range("model.class_dropout", self.model.class_dropout, 0, 1)
        _check_latents(data, diffusion)
        if diffusion.learned_sigma and diffusion.objective != "epsilon":
            raise UsageError(
                f"diffusion.learned_sigma is true and diffusion.objective {diffusion.objective!r}: the bound is that of"
                " the prediction of noise. Set diffusion.learned_sigma=false, or diffusion.objective=epsilon."
            )
        if self.optim.label_smoothing:
            raise UsageError(
                f"optim.label_smoothing is {self.optim.label_smoothing:g}: a generative model has no labels to smooth. "
                "Leave it out."
            )


def _check_latents(data: DataConfig, diffusion: DiffusionConfig) -> None:
    if not 0 < diffusion.scaling < float("inf"):
        raise UsageError(f"diffusion.scaling is {diffusion.scaling:g}; it has to be greater than 0.")
    if data.latents is None:
        if diffusion.scaling != 1:
            raise UsageError(
                f"diffusion.scaling is {diffusion.scaling:g}, and only latents are scaled; set diffusion.scaling=1, or "
                "data.latents."
            )
        return
    for key, default, written in (("root", None, "null"), ("options", {}, "{}"), ("channels", 3, "3")):
        value = getattr(data, key)
        if value != default:
            shown = str(value) if isinstance(value, Path) else value
            raise UsageError(
                f"data.{key} is {shown!r}, and data.latents is set, which needs no images; set data.{key}={written}."
            )
