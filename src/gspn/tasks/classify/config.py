"""The configuration of a training run: what a recipe says, and what is saved beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..configs import assigned, check_choice, check_range, from_mapping, parse_override, read_yaml, to_mapping
from ..errors import UsageError


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
class OptimConfig:
    """The optimiser: timm's ``create_optimizer_v2``."""

    name: str = "adamw"
    lr: float = 5e-4
    """For ``lr_base_batch`` images an update; scaled linearly to the images that an update really has."""
    lr_base_batch: int | None = 512
    """null: ``lr`` and the schedule's rates are taken as they are."""
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float = 0.9
    layer_decay: float | None = None
    """Factor on the rate for each layer away from the head, by the model's ``group_matcher``."""
    clip_grad: float | None = None
    """Largest norm of all gradients together."""
    label_smoothing: float = 0.0
    accumulate: int = 1
    """Batches of each process whose gradients are averaged for one update."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimiser."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over updates: timm's ``create_scheduler_v2``."""

    name: str = "cosine"
    epochs: int = 300
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    """Where the warm-up starts; scaled like ``optim.lr``."""
    min_lr: float = 0.0
    """Where the decay ends; scaled like ``optim.lr``."""
    cooldown_epochs: int = 0
    """Epochs at ``min_lr`` after the decay, among ``epochs``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments: decay_epochs, decay_rate, cycle_limit, k_decay, ..."""


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights: timm's ``ModelEmaV3``."""

    decay: float | None = None
    """null: none is kept."""
    warmup: bool = True
    """Let the decay grow from 0, so that short runs do not average in their beginning."""
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3


@dataclass(frozen=True)
class RunConfig:
    """Where and how it runs; of these only ``seed`` and ``precision`` change what is computed."""

    output: Path = Path("runs/classify")
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over the processes (FSDP2) instead of copying them (DDP)."""
    deterministic: bool = False
    """Only deterministic CUDA kernels, so that a resumed run is the uninterrupted one bit for bit there too."""
    checkpoint_every_s: float = 1800.0
    """Seconds between checkpoints within an epoch; there is one after every epoch anyway."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = 50
    """Updates between points of the trackers' curves."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers that accelerate knows: tensorboard, wandb, ..."""


@dataclass(frozen=True)
class Resolved:
    """What follows from the rest; computed anew in each run, and never read."""

    processes: int
    images_per_update: int
    updates_per_epoch: int
    lr: float
    min_lr: float
    warmup_lr: float
    num_classes: int
    train_images: int
    eval_images: int
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    parameters: int


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    Args: the sections below, each a dataclass of its own with a default for every key.

    Raises:
        UsageError: a value out of its range, or two that exclude each other.

    Example:
        >>> config = TrainConfig(data=DataConfig(name="digits", size=16), schedule=ScheduleConfig(epochs=3))
        >>> config.schedule.epochs, config.optim.name
        (3, 'adamw')
        >>> config.changed("optim.lr=1e-3").optim.lr
        0.001
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)
    resolved: Resolved | None = None

    def __post_init__(self) -> None:
        data, augment, optim, schedule, run = self.data, self.augment, self.optim, self.schedule, self.run
        for place, value, least in (
            ("data.size", data.size, 1),
            ("data.batch_size", data.batch_size, 1),
            ("data.eval_batch_size", data.eval_batch_size, 1),
            ("data.workers", data.workers, 0),
            ("optim.lr", optim.lr, 0),
            ("optim.lr_base_batch", optim.lr_base_batch, 1),
            ("optim.weight_decay", optim.weight_decay, 0),
            ("optim.accumulate", optim.accumulate, 1),
            ("schedule.epochs", schedule.epochs, 1),
            ("schedule.warmup_epochs", schedule.warmup_epochs, 0),
            ("schedule.cooldown_epochs", schedule.cooldown_epochs, 0),
            ("run.eval_every", run.eval_every, 1),
            ("run.log_every", run.log_every, 1),
            ("run.checkpoint_every_s", run.checkpoint_every_s, 0),
            ("run.seed", run.seed, 0),
            ("augment.mixup", augment.mixup, 0),
            ("augment.cutmix", augment.cutmix, 0),
        ):
            check_range(place, value, least)
        for place, value in (
            ("model.drop_path", self.model.drop_path),
            ("model.drop", self.model.drop),
            ("optim.label_smoothing", optim.label_smoothing),
            ("optim.layer_decay", optim.layer_decay),
            ("ema.decay", self.ema.decay),
            ("augment.hflip", augment.hflip),
            ("augment.vflip", augment.vflip),
            ("augment.re_prob", augment.re_prob),
            ("augment.mix_prob", augment.mix_prob),
            ("augment.mix_switch_prob", augment.mix_switch_prob),
            ("data.crop_pct", data.crop_pct),
        ):
            check_range(place, value, 0, 1)
        if schedule.warmup_epochs + schedule.cooldown_epochs > schedule.epochs:
            raise UsageError(
                f"schedule.epochs is {schedule.epochs}, and warm-up and cool-down alone take "
                f"{schedule.warmup_epochs + schedule.cooldown_epochs:g}; raise the one or lower the others."
            )
        if self.mixes and data.batch_size % 2:
            raise UsageError(
                f"data.batch_size is {data.batch_size}; mixup and cutmix pair images, so it has to be even."
            )
        if run.fsdp and self.ema.decay is not None:
            raise UsageError(
                f"ema.decay is {self.ema.decay:g} and run.fsdp is true: timm's average needs whole weights in each "
                "process, which FSDP does not keep. Set ema.decay=null, or run.fsdp=false."
            )
        for name in run.trackers:
            check_choice(
                "run.trackers", name, ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive")
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.augment.enabled and (self.augment.mixup > 0 or self.augment.cutmix > 0)

    def changed(self, *overrides: str, **keys: Any) -> TrainConfig:
        """A copy with each ``"section.key=value"`` applied in turn, then ``**{"section.key": value}``.

        Raises:
            UsageError: as for a file: an unknown key, a value of another type or out of range.
        """
        values = to_mapping(replace(self, resolved=None))
        for key, value in [*map(parse_override, overrides), *keys.items()]:
            values = assigned(values, key, value)
        return config_from(values)


def config_from(values: dict[str, Any]) -> TrainConfig:
    """A configuration from nested mappings, such as a YAML file's; ``resolved``, which only states, is left out.

    Raises:
        UsageError: an unknown key, or a value of another type or out of range.
    """
    if not isinstance(values, dict):
        raise UsageError(f"the configuration is {values!r}, not a mapping with {', '.join(_sections())}.")
    return from_mapping(TrainConfig, {key: value for key, value in values.items() if key != "resolved"})


def load_config(source: str | Path) -> TrainConfig:
    """Read a configuration from a YAML file, or from the recipe of that name (:func:`recipe_names`).

    Raises:
        UsageError: there is no such file or recipe, or it is not right.

    Example:
        >>> load_config("digits_pico").data.name
        'digits'
    """
    from .recipes import recipe_text

    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
    else:
        text = recipe_text(str(source))
    try:
        return config_from(read_yaml(text, "the file") or {})
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def _sections() -> list[str]:
    return [one.name for one in fields(TrainConfig) if one.name != "resolved"]
