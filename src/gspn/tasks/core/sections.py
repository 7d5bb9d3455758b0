"""What the configurations of all training runs share: the optimiser, the schedule, the average, the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from .config import assigned, check_choice, check_range, from_mapping, parse_override, read_yaml, to_mapping
from .errors import UsageError, nearest


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

    output: Path = Path("runs/train")
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
    """What follows from the rest of a configuration; computed anew in each run, and never read."""

    processes: int
    images_per_update: int
    updates_per_epoch: int
    lr: float
    min_lr: float
    warmup_lr: float
    parameters: int
    num_classes: int
    train_images: int


def check_training(optim: OptimConfig, schedule: ScheduleConfig, ema: EmaConfig, run: RunConfig) -> None:
    """Refuse values out of their range, and two that exclude each other.

    Raises:
        UsageError: with the key, its value and what it has to be.
    """
    for place, value, least in (
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
    ):
        check_range(place, value, least)
    check_range("optim.layer_decay", optim.layer_decay, 0, 1)
    check_range("ema.decay", ema.decay, 0, 1)
    if schedule.warmup_epochs + schedule.cooldown_epochs > schedule.epochs:
        raise UsageError(
            f"schedule.epochs is {schedule.epochs}, and warm-up and cool-down alone take "
            f"{schedule.warmup_epochs + schedule.cooldown_epochs:g}; raise the one or lower the others."
        )
    if run.fsdp and ema.decay is not None:
        raise UsageError(
            f"ema.decay is {ema.decay:g} and run.fsdp is true: timm's average needs whole weights in each "
            "process, which FSDP does not keep. Set ema.decay=null, or run.fsdp=false."
        )
    for name in run.trackers:
        check_choice("run.trackers", name, ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive"))


class Configuration:
    """What can be done with the configuration of any run; a base of frozen dataclasses of sections.

    The section ``resolved`` states what follows from the others, is computed in each run and never read.
    """

    PRESETS: ClassVar[str]
    """The package whose YAML files are the presets."""

    def changed(self, *overrides: str, **keys: Any) -> Self:
        """A copy with each ``"section.key=value"`` applied in turn, then ``**{"section.key": value}``.

        Raises:
            UsageError: as for a file: an unknown key, a value of another type or out of range.
        """
        values = {key: value for key, value in to_mapping(self).items() if key != "resolved"}
        for key, value in [*map(parse_override, overrides), *keys.items()]:
            values = assigned(values, key, value)
        return self.from_values(values)

    @classmethod
    def from_values(cls, values: Any) -> Self:
        """A configuration from nested mappings, such as a YAML file's; ``resolved``, which only states, is left out.

        Raises:
            UsageError: an unknown key, or a value of another type or out of range.
        """
        if not isinstance(values, Mapping):
            sections = [one.name for one in fields(cls) if one.name != "resolved"]  # type: ignore[arg-type]
            raise UsageError(f"the configuration is {values!r}, not a mapping with {', '.join(sections)}.")
        return from_mapping(cls, {key: value for key, value in values.items() if key != "resolved"})

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a configuration from a YAML file, or from the preset of that name.

        Raises:
            UsageError: there is no such file or preset, or it is not right.
        """
        path = Path(source)
        if path.suffix in (".yaml", ".yml") or path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise UsageError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
        else:
            text = cls.preset_text(str(source))
        try:
            return cls.from_values(read_yaml(text, "the file") or {})
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None

    @classmethod
    def preset_names(cls) -> list[str]:
        """The names of the presets that come with the package, sorted."""
        names = (one.name for one in files(cls.PRESETS).iterdir())
        return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))

    @classmethod
    def preset_text(cls, name: str) -> str:
        """The YAML of a preset, whose first comment says what it is.

        Raises:
            UsageError: there is no preset of that name.
        """
        known = cls.preset_names()
        if name not in known:
            hint = nearest(name, known) or f"; presets: {', '.join(known)}"
            raise UsageError(f"{name!r} is neither a file nor a preset{hint}")
        return (files(cls.PRESETS) / f"{name}.yaml").read_text(encoding="utf-8")

    @classmethod
    def preset_title(cls, name: str) -> str:
        """The preset's first comment line."""
        return cls.preset_text(name).partition("\n")[0].lstrip("# ").strip()
