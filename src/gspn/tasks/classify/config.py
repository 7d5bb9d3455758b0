"""The configuration of a classifier's training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..._errors import UsageError
from ..core.config import setting
from ..core.sections import Configuration, ImageData, ModelExecution, RunConfig


@dataclass(frozen=True)
class DataConfig(ImageData):
    """The images and their preprocessing."""

    eval_split: str = "val"
    size: int = setting(224, 1)
    """Height and width of the model's input in pixels."""
    eval_batch_size: int | None = setting(None, 1, free=True)
    """Images per forward pass in evaluations; null: ``batch_size``."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from pixels in [0, 1]; null: the model's own."""
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    """`bilinear`, `bicubic`, ... in evaluations; null: the model's own."""
    crop_pct: float | None = setting(None, 0, 1)
    """Side of the evaluated crop over the side the image is resized to; null: the model's own."""


@dataclass(frozen=True)
class ModelConfig(ModelExecution):
    """The classifier."""

    channels_last: bool = False
    name: str = "gspn_pico"
    """A timm model name; those of :mod:`gspn.models` are registered."""
    pretrained: bool = False
    drop_path: float | None = setting(None, 0, 1)
    """Largest rate of stochastic depth, which grows linearly with depth; null: the model's default."""
    drop: float | None = setting(None, 0, 1)
    """Dropout before the classifier; null: the model's default."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``timm.create_model``."""


@dataclass(frozen=True)
class AffineConfig:
    """torchvision's ``RandomAffine`` right after the crop, for data on which timm's policies are too strong."""

    degrees: float = 0.0
    translate: tuple[float, float] | None = None
    """Largest shift along x and y, as a fraction of the side."""
    scale: tuple[float, float] | None = None
    shear: float = 0.0
    fill: int = 0
    """Grey value, 0 to 255, of the area from outside the image."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images: timm's ``create_transform`` and ``Mixup``."""

    enabled: bool = True
    """false: training images are resized and cropped like evaluated ones, and nothing is mixed."""
    crop: Literal["resized", "none"] = "resized"
    """`resized`: a random part of the image, by ``scale`` and ``ratio``; `none`: the whole image, resized."""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    interpolation: str = "random"
    hflip: float = setting(0.5, 0, 1)
    vflip: float = setting(0.0, 0, 1)
    affine: AffineConfig | None = None
    color_jitter: float = 0.4
    """Replaced by ``auto_augment`` if that is set, as in timm."""
    auto_augment: str | None = None
    """timm's policy string, such as `rand-m9-mstd0.5`."""
    re_prob: float = setting(0.0, 0, 1)
    """Probability of random erasing."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: int = 1
    mixup: float = setting(0.0, 0)
    """alpha of mixup; 0 disables it."""
    cutmix: float = setting(0.0, 0)
    """alpha of cutmix; 0 disables it."""
    mix_prob: float = setting(1.0, 0, 1)
    """Probability that a batch is mixed."""
    mix_switch_prob: float = setting(0.5, 0, 1)
    """Probability of cutmix where both are enabled."""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    mix_epochs: int | None = None
    """Epochs after which mixing ends; null: never."""


@dataclass(frozen=True)
class TrainConfig(Configuration):
    """The configuration of a classifier's training run.

    Raises:
        UsageError: a value out of range, or two that exclude each other.

    Example:
        >>> config = TrainConfig(data=DataConfig(name="digits", size=16))
        >>> config.schedule.epochs, config.optim.name
        (300, 'adamw')
        >>> config.changed("optim.lr=1e-3").optim.lr
        0.001
        >>> TrainConfig.load("digits_pico").data.name
        'digits'
    """

    PRESETS: ClassVar[str] = "gspn.tasks.classify.presets"
    HAS_LABELS: ClassVar[bool] = True

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    run: RunConfig = RunConfig(output=Path("runs/classify"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixes and self.data.batch_size % 2:
            raise UsageError(
                f"data.batch_size is {self.data.batch_size}; mixup and cutmix pair images, so it has to be even."
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is enabled."""
        return self.augment.enabled and (self.augment.mixup > 0 or self.augment.cutmix > 0)
