"""The configuration of a training run: what a preset says, and what is saved beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..core.config import check_range
from ..core.errors import UsageError
from ..core.sections import Configuration, EmaConfig, OptimConfig, Resolved, RunConfig, ScheduleConfig, check_training


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from, and how it becomes a batch."""

    name: str = "mnist5k"
    """`emoji`, `digits`, `mnist5k`, `folder`, ...: what :func:`gspn.data.open_dataset` opens."""
    root: Path | None = None
    """Where the data lie, for those that do not come with the package."""
    train_split: str = "train"
    eval_split: str = "val"
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of :func:`gspn.data.open_dataset`."""
    size: int = 224
    """Height and width of the network's input."""
    batch_size: int = 64
    """Images in one forward pass of one process."""
    eval_batch_size: int | None = None
    """Likewise when evaluating; the training's by default."""
    workers: int = 4
    """Processes that load images, for each training process; 0 loads in the training process."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from pixels in [0, 1]; the model's own by default."""
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    """`bilinear`, `bicubic`, ... when evaluating; the model's own by default."""
    crop_pct: float | None = None
    """Side of the evaluated crop over the side the image is resized to; the model's own by default."""


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "gspn_pico"
    """A timm model name; those of :mod:`gspn.models` are among them."""
    pretrained: bool = False
    drop_path: float | None = None
    """Largest rate of stochastic depth, growing linearly with depth; the model's default where null."""
    drop: float | None = None
    """Dropout before the classifier."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model, as ``timm.create_model`` takes them."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = False
    compile: bool = False
    """``torch.compile`` the network."""


@dataclass(frozen=True)
class AffineConfig:
    """torchvision's ``RandomAffine``, right after the crop: for sets on which timm's policies are too strong."""

    degrees: float = 0.0
    translate: tuple[float, float] | None = None
    """Largest shift along x and y, as a fraction of the side."""
    scale: tuple[float, float] | None = None
    shear: float = 0.0
    fill: int = 0
    """Grey value, 0 to 255, of what comes into view from outside."""


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to training images: timm's ``create_transform`` and ``Mixup``."""

    enabled: bool = True
    """False: training images are resized and cropped like evaluated ones, and nothing is mixed."""
    crop: Literal["resized", "none"] = "resized"
    """`resized`: a random part of the image, by ``scale`` and ``ratio``. `none`: the whole image, resized."""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    interpolation: str = "random"
    hflip: float = 0.5
    vflip: float = 0.0
    affine: AffineConfig | None = None
    color_jitter: float = 0.4
    """As in timm, an ``auto_augment`` policy takes its place."""
    auto_augment: str | None = None
    """timm's policy string, such as `rand-m9-mstd0.5`."""
    re_prob: float = 0.0
    """Probability of random erasing."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: int = 1
    mixup: float = 0.0
    """alpha; 0 turns it off."""
    cutmix: float = 0.0
    """alpha; 0 turns it off."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    mix_epochs: int | None = None
    """Epochs after which mixing ends; null: never."""


@dataclass(frozen=True)
class ResolvedClassifier(Resolved):
    """What follows from the rest; computed anew in each run, and never read."""

    eval_images: int
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float


@dataclass(frozen=True)
class TrainConfig(Configuration):
    """A whole training run of a classifier.

    Args: the sections below, each a dataclass of its own with a default for every key.

    Raises:
        UsageError: a value out of its range, or two that exclude each other.

    Example:
        >>> config = TrainConfig(data=DataConfig(name="digits", size=16), schedule=ScheduleConfig(epochs=3))
        >>> config.schedule.epochs, config.optim.name
        (3, 'adamw')
        >>> config.changed("optim.lr=1e-3").optim.lr
        0.001
        >>> TrainConfig.load("digits_pico").data.name
        'digits'
    """

    PRESETS: ClassVar[str] = "gspn.tasks.classify.presets"

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/classify")))
    resolved: ResolvedClassifier | None = None

    def __post_init__(self) -> None:
        check_training(self.optim, self.schedule, self.ema, self.run)
        data, augment = self.data, self.augment
        for place, value, least in (
            ("data.size", data.size, 1),
            ("data.batch_size", data.batch_size, 1),
            ("data.eval_batch_size", data.eval_batch_size, 1),
            ("data.workers", data.workers, 0),
            ("augment.mixup", augment.mixup, 0),
            ("augment.cutmix", augment.cutmix, 0),
        ):
            check_range(place, value, least)
        for place, value in (
            ("model.drop_path", self.model.drop_path),
            ("model.drop", self.model.drop),
            ("optim.label_smoothing", self.optim.label_smoothing),
            ("augment.hflip", augment.hflip),
            ("augment.vflip", augment.vflip),
            ("augment.re_prob", augment.re_prob),
            ("augment.mix_prob", augment.mix_prob),
            ("augment.mix_switch_prob", augment.mix_switch_prob),
            ("data.crop_pct", data.crop_pct),
        ):
            check_range(place, value, 0, 1)
        if self.mixes and data.batch_size % 2:
            raise UsageError(
                f"data.batch_size is {data.batch_size}; mixup and cutmix pair images, so it has to be even."
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.augment.enabled and (self.augment.mixup > 0 or self.augment.cutmix > 0)


load_config = TrainConfig.load
"""Read a configuration from a YAML file, or from the preset of that name (:func:`preset_names`)."""

preset_names = TrainConfig.preset_names
"""The names of the presets that come with the package."""
