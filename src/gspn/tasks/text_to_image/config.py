"""Configuration sections that training and distillation share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..core import sections
from ..core.config import setting
from ..core.sections import ImageData


@dataclass(frozen=True)
class DataConfig(ImageData):
    """Images with captions, encoded once and cached."""

    name: str = "emoji"
    size: int = setting(512, 1, 65536)
    """Height and width of an image in pixels; smaller images are enlarged, others cropped at the centre."""
    batch_size: int = setting(8, 1, free=True)
    hflip: float = setting(0.0, 0, 1)
    """Probability of mirroring an image."""
    cache: Path | None = setting(None, free=True)
    """Directory of latents and encoded captions, for this run and others on the same data; null: in the run's."""
    encode_batch_size: int = setting(16, 1)
    """Images that the autoencoder encodes at a time."""


@dataclass(frozen=True)
class SamplesConfig(sections.SamplesConfig):
    """The images drawn during training, always from the same noise."""

    steps: int = setting(30, 1)
    guidance: float = setting(5.0, 0)
    prompts: list[str] = field(default_factory=list)
    """The prompts to draw; empty: captions of the data, evenly spread."""
    number: int = setting(8, 1)
    """Number of such captions."""
