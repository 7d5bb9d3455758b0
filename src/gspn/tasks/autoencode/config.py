"""The configuration of an autoencoder's training run: what a preset says, and what is saved beside the weights."""

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
from ..diffusion.autoencoder import vae_scale_factor


@dataclass(frozen=True)
class DataConfig:
    """What is encoded."""

    name: str = "emoji"
    """`emoji`, `digits`, `mnist5k`, `folder`, ...: what :func:`gspn.data.open_dataset` opens."""
    root: Path | None = None
    """Where the data lie, for those that do not come with the package."""
    train_split: str = "train"
    eval_split: str | None = None
    """Images whose error is measured after every epoch; null for none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of :func:`gspn.data.open_dataset`."""
    size: int = 64
    """Height and width of an image; smaller ones are enlarged, others cropped at the middle."""
    crop: int | None = None
    """Side of the piece of an image that is learnt at a time, at random places; null: the whole image."""
    channels: Literal[1, 3] = 3
    """1: images become grey."""
    hflip: float = 0.5
    """Probability of mirroring an image."""
    batch_size: int = 32
    """Images in one forward pass of one process."""
    workers: int = 4
    """Processes that load images, for each training process; 0 loads in the training process."""


@dataclass(frozen=True)
class ModelConfig:
    """diffusers' ``AutoencoderKL``: a side is halved between any two of its levels."""

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    attention: bool = True
    """Self-attention between encoder and decoder."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``AutoencoderKL``."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = True
    compile: bool = False
    """``torch.compile`` the network."""


@dataclass(frozen=True)
class LossConfig:
    """What is made small: the error of the reconstruction, and the latents' distance from a unit Gaussian."""

    error: Literal["l1", "mse"] = "l1"
    kl: float = 1e-4
    """Of the mean divergence of a latent's number, in nats."""


@dataclass(frozen=True)
class ResolvedAutoencoder(Resolved):
    """What follows from the rest; computed anew in each run, and never read."""

    latent_size: int
    """Height and width of an image's latents."""


@dataclass(frozen=True)
class AutoencodeConfig(Configuration):
    """A whole training run of an autoencoder.

    Args: the sections below, each a dataclass of its own with a default for every key.

    Raises:
        UsageError: a value out of its range, or two that exclude each other.

    Example:
        >>> AutoencodeConfig.load("emoji64").model.latent_channels
        4
    """

    PRESETS: ClassVar[str] = "gspn.tasks.autoencode.presets"

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(epochs=100))
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.999))
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/autoencoder")))
    resolved: ResolvedAutoencoder | None = None

    def __post_init__(self) -> None:
        check_training(self.optim, self.schedule, self.ema, self.run)
        data, model = self.data, self.model
        for place, value, least in (
            ("data.size", data.size, 1),
            ("data.crop", data.crop, 1),
            ("data.batch_size", data.batch_size, 1),
            ("data.workers", data.workers, 0),
            ("model.layers_per_block", model.layers_per_block, 1),
            ("model.latent_channels", model.latent_channels, 1),
            ("model.norm_num_groups", model.norm_num_groups, 1),
            ("loss.kl", self.loss.kl, 0),
        ):
            check_range(place, value, least)
        check_range("data.hflip", data.hflip, 0, 1)
        if not model.block_out_channels:
            raise UsageError("model.block_out_channels is []; give the width of each level, as [32, 64, 64].")
        factor = vae_scale_factor(model.block_out_channels)
        for place, side in (("data.size", data.size), ("data.crop", data.crop)):
            if side is not None and side % factor:
                raise UsageError(
                    f"{place} is {side}, and {len(model.block_out_channels)} levels need multiples of {factor}."
                )
        if data.crop is not None and data.crop > data.size:
            raise UsageError(
                f"data.crop is {data.crop} and data.size {data.size}; a piece is no larger than its image."
            )
        if self.run.fsdp:
            raise UsageError(
                "run.fsdp is true, and an autoencoder is small; set run.fsdp=false, which copies it (DDP)."
            )
        if self.optim.label_smoothing:
            raise UsageError(
                f"optim.label_smoothing is {self.optim.label_smoothing:g}: an autoencoder has no labels to smooth. "
                "Leave it out."
            )
