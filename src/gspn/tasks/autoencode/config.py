"""The configuration of an autoencoder's training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..._errors import UsageError
from ..core.config import setting
from ..core.sections import Configuration, EmaConfig, ImageData, ModelExecution, OptimConfig, RunConfig, ScheduleConfig
from ..diffusion.autoencoder import vae_scale_factor


@dataclass(frozen=True)
class DataConfig(ImageData):
    """The images to encode."""

    name: str = "emoji"
    batch_size: int = setting(32, 1, free=True)
    crop: int | None = setting(None, 1, 65536)
    """Side of the random crops of an image to learn from; null: the whole image."""
    channels: Literal[1, 3] = 3
    """1: convert images to grey."""
    hflip: float = setting(0.5, 0, 1)
    """Probability of mirroring an image."""


@dataclass(frozen=True)
class ModelConfig(ModelExecution):
    """diffusers' ``AutoencoderKL``, which halves the sides between two successive levels."""

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512], metadata={"range": (1, 65536)})
    layers_per_block: int = setting(2, 1)
    latent_channels: int = setting(4, 1)
    norm_num_groups: int = setting(32, 1)
    attention: bool = True
    """Use self-attention in the middle block of encoder and decoder."""
    decoder_of: str | None = None
    """An ``AutoencoderKL`` of this architecture, by path or hub id, whose decoder is trained further. Its encoder stays
    as it is, so that models of its latents need no training."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``AutoencoderKL``."""

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return vae_scale_factor(self.block_out_channels)


@dataclass(frozen=True)
class LossConfig:
    """The loss: the reconstruction error, and the divergence of the latents from a unit Gaussian."""

    error: Literal["l1", "mse"] = "l1"
    kl: float = setting(1e-4, 0)
    """Weight of the mean divergence of a latent number, in nats."""


@dataclass(frozen=True)
class AutoencodeConfig(Configuration):
    """The configuration of an autoencoder's training run.

    Raises:
        UsageError: a value out of range, or two that exclude each other.

    Example:
        >>> AutoencodeConfig.load("emoji64").model.latent_channels
        4
    """

    PRESETS: ClassVar[str] = "gspn.tasks.autoencode.presets"

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(epochs=100)
    ema: EmaConfig = EmaConfig(decay=0.999)
    run: RunConfig = RunConfig(output=Path("runs/autoencoder"))

    def __post_init__(self) -> None:
        if self.run.fsdp:
            raise UsageError("FSDP is not supported for autoencoders; set run.fsdp=false (DDP).")
        super().__post_init__()
        data, model = self.data, self.model
        if not model.block_out_channels:
            raise UsageError("model.block_out_channels is []; give the width of each level, as [32, 64, 64].")
        if data.sizes is not None and data.crop is not None:
            raise UsageError(
                f"data.sizes is {data.sizes} and data.crop {data.crop}, which gives all images one size; leave one out."
            )
        sides = [("data.size", data.size), ("data.crop", data.crop), *(("data.sizes", one) for one in data.sizes or ())]
        for key_path, side in sides:
            if side is not None and side % model.factor:
                raise UsageError(
                    f"{key_path} is {side}, and {len(model.block_out_channels)} levels need multiples of "
                    f"{model.factor}."
                )
        if data.crop is not None and data.crop > data.size:
            raise UsageError(f"data.crop is {data.crop} and data.size {data.size}; a crop cannot exceed its image.")
