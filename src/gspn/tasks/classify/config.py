"""The configuration of a classifier's training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..._errors import MissingExtraError, UsageError, require
from ..._files import printable
from ..core.config import check_choice, setting
from ..core.sections import Configuration, ImageData, ModelExecution, RunConfig

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class DataConfig(ImageData):
    """The images and their preprocessing."""

    eval_split: str = "val"
    size: int = setting(224, 1, 65536)
    """Height and width of the model's input in pixels."""
    eval_batch_size: int | None = setting(None, 1, free=True)
    """Images per forward pass in evaluations; null: ``batch_size``."""
    mean: tuple[float, float, float] | None = setting(None)
    """Subtracted from pixels in [0, 1]; null: the model's own."""
    std: tuple[float, float, float] | None = setting(None, above=0)
    interpolation: str | None = None
    """`bilinear`, `bicubic`, ... in evaluations; null: the model's own."""
    crop_pct: float | None = setting(None, most=1, above=0)
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

    degrees: float = setting(0.0, 0, 180)
    translate: tuple[float, float] | None = setting(None, 0, 1)
    """Largest shift along x and y, as a fraction of the side."""
    scale: tuple[float, float] | None = setting(None, above=0)
    shear: float = setting(0.0, above=-90, below=90)
    fill: int = setting(0, 0, 255)
    """Grey value, 0 to 255, of the area from outside the image."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images: timm's ``create_transform`` and ``Mixup``."""

    enabled: bool = True
    """false: training images are resized and cropped like evaluated ones, and nothing is mixed."""
    crop: Literal["resized", "none"] = "resized"
    """`resized`: a random part of the image, by ``scale`` and ``ratio``; `none`: the whole image, resized."""
    scale: tuple[float, float] = setting((0.08, 1.0), most=1, above=0)
    ratio: tuple[float, float] = setting((0.75, 4 / 3), above=0)
    interpolation: str = "random"
    hflip: float = setting(0.5, 0, 1)
    vflip: float = setting(0.0, 0, 1)
    affine: AffineConfig | None = None
    color_jitter: float = setting(0.4, 0)
    """Replaced by ``auto_augment`` if that is set, as in timm."""
    auto_augment: str | None = None
    """timm's policy string, such as `rand-m9-mstd0.5`."""
    re_prob: float = setting(0.0, 0, 1)
    """Probability of random erasing."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: int = setting(1, 1)
    mixup: float = setting(0.0, 0)
    """alpha of mixup; 0 disables it."""
    cutmix: float = setting(0.0, 0)
    """alpha of cutmix; 0 disables it."""
    mix_prob: float = setting(1.0, 0, 1)
    """Probability that a batch is mixed."""
    mix_switch_prob: float = setting(0.5, 0, 1)
    """Probability of cutmix where both are enabled."""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    mix_epochs: int | None = setting(None, 0)
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
        augment, affine = self.augment, self.augment.affine
        check_choice("data.interpolation", self.data.interpolation, (*INTERPOLATIONS, None))
        check_choice("augment.interpolation", augment.interpolation, (*INTERPOLATIONS, "random"))
        pairs = {"scale": augment.scale, "ratio": augment.ratio, "affine.scale": affine and affine.scale}
        for key, pair in pairs.items():
            if pair is not None and pair[0] > pair[1]:
                raise UsageError(f"augment.{key} is {list(pair)}; the first number has to be the smaller one.")
        if augment.auto_augment is not None:
            _check_policy(augment.auto_augment)
        if self.mixes and self.data.batch_size % 2:
            raise UsageError(
                f"data.batch_size is {self.data.batch_size}; mixup and cutmix pair images, so it has to be even."
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is enabled."""
        return self.augment.enabled and (self.augment.mixup > 0 or self.augment.cutmix > 0)


def _check_policy(text: str) -> None:
    """Let timm itself read a policy of augmentation, which training would else do minutes later."""
    try:
        timm = require("timm.data.auto_augment")
    except MissingExtraError:
        return  # then training says so
    kind = next((one for one in ("rand", "augmix") if text.startswith(one)), "")
    parse = {"rand": timm.rand_augment_transform, "augmix": timm.augment_and_mix_transform}
    try:
        for part in text.split("-")[1:]:  # timm passes over those without a number
            if part[:1] != "t" and not any(letter.isdigit() for letter in part):
                raise ValueError(f"{part!r} has no number")
        parse.get(kind, timm.auto_augment_transform)(text, {})
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"augment.auto_augment is {text!r}, which timm does not take ({printable(error) or 'unknown policy'}); "
            "give a policy such as rand-m9-mstd0.5, augmix-m5-w4-d2, original or 3a."
        ) from None
