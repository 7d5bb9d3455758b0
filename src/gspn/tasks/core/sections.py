"""Training configurations: the sections that all tasks share, and the base of a task's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from ..._errors import UsageError, nearest
from ..._files import printable, read_text, short
from .config import (
    assigned,
    check_choice,
    check_range,
    flat,
    from_mapping,
    parse_override,
    read_yaml,
    setting,
    settings,
    to_mapping,
)

_MOST_YAML = 1 << 20  # bytes of a configuration


@dataclass(frozen=True)
class ImageData:
    """The images to learn from."""

    name: str = "mnist5k"
    """`emoji`, `digits`, `mnist5k`, `folder`, ...: any name that :mod:`gspn.data` opens."""
    root: Path | None = setting(None, free=True)
    """Directory of the data, for those that do not come with the package."""
    train_split: str = "train"
    eval_split: str | None = None
    """The held-out images, evaluated after every epoch; null for none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function of :mod:`gspn.data` that opens the data."""
    size: int = setting(64, 1, 65536)
    """Height and width of an image in pixels; smaller images are enlarged, others cropped at the centre."""
    sizes: list[int] | None = setting(None, 1, 65536)
    """The sizes to train at, `size` among them, which stays that of evaluations and samples; null: `size` alone. Each
    update draws one at random. At size s its batches take `batch_size` x (`size` / s)^2 images, rounded down, at most
    `batch_size` and at least one, so that larger images take no more pixels than a batch at `size`. The epoch passes
    over the rest of the update's images unread, so it has as many updates as without."""
    batch_size: int = setting(64, 1, free=True)  # its product with optim.accumulate and the processes is compared
    """Images per forward pass of one process."""
    workers: int = setting(4, 0, 1024, free=True)
    """Processes that load images, for each training process; 0 loads in the training process."""

    @property
    def images_by_size(self) -> dict[int, int]:
        """The number of images in a batch at each of ``sizes``; empty without.

        Example:
            >>> ImageData(size=64, sizes=[32, 64, 96, 128], batch_size=8).images_by_size
            {32: 8, 64: 8, 96: 3, 128: 2}
        """
        return {s: max(1, min(self.batch_size, self.batch_size * self.size**2 // s**2)) for s in self.sizes or ()}


@dataclass(frozen=True)
class ModelExecution:
    """How the model runs; the base of each task's ``model`` section."""

    grad_checkpointing: bool = setting(False, free=True)
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = True
    compile: bool = setting(False, free=True)
    """Compile the model with ``torch.compile``."""


@dataclass(frozen=True)
class MixerConfig(ModelExecution):
    """GSPN mixers that learn to replace a teacher's self-attention; the base of a distillation's ``model`` section."""

    proxy_dim: int | None = setting(None, 1)
    """null: an eighth of the channels that are scanned."""
    groups: int | None = setting(None, 1)
    """null: separate taps for each channel; 1: shared taps."""
    segment: int | None = setting(None, 1)
    """null: global scans."""
    normalize_scans: bool = True
    """Record each layer's number of lines at ``data.size`` as its ``reference_lines``, so that its states are as large
    at any other size; false: the paper's operator."""
    skip: bool = True
    proxy_bias: bool = True
    """Give taps and gates a constant part, which `fit` needs."""
    initialize: Literal["fit", "copy", "random"] = "fit"
    """`random`; `copy`: from the teacher's projections to values and to the output; `fit`: copies, and constant gates
    by least squares against the attention: :mod:`gspn.tasks.core.gate_fitting`."""
    init_from: str | None = None
    """An adapter to continue from; replaces all settings of the mixers."""

    def check_start(self) -> None:
        """Refuse options that exclude each other.

        Raises:
            UsageError: ``initialize`` needs what ``proxy_bias`` takes away.
        """
        if self.initialize == "fit" and not self.proxy_bias:
            raise UsageError(
                "model.initialize is 'fit' and model.proxy_bias false: constant gates need it. Set "
                "model.initialize=copy, or model.proxy_bias=true."
            )


@dataclass(frozen=True)
class SamplesConfig:
    """The images that a generative model draws during training, always from the same noise."""

    every: int = setting(5, 0)
    """Epochs between two drawings; there is one after the last epoch in any case. 0: none."""
    steps: int = setting(50, 1)
    """Denoising steps."""
    guidance: float = setting(2.0, 0)
    """Scale of classifier-free guidance."""

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether images are drawn after this epoch, counted from 1, of so many."""
        return self.every > 0 and (epoch == epochs or epoch % self.every == 0)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer: timm's ``create_optimizer_v2``."""

    name: str = "adamw"
    lr: float = setting(5e-4, 0)
    """For ``lr_base_batch`` images per update; scaled linearly to the actual images per update."""
    lr_base_batch: int | None = setting(512, 1)
    """null: ``lr`` and the schedule's rates are not scaled."""
    weight_decay: float = setting(0.05, 0)
    betas: tuple[float, float] | None = setting(None, 0, below=1)
    eps: float | None = setting(None, 0)
    momentum: float = setting(0.9, 0, below=1)
    layer_decay: float | None = setting(None, most=1, above=0)
    """Factor on the rate for each layer away from the head, by the model's ``group_matcher``."""
    clip_grad: float | None = setting(None, above=0)
    """Largest norm of all gradients together."""
    label_smoothing: float = setting(0.0, 0, 1)
    accumulate: int = setting(1, 1, free=True)
    """Batches of each process whose gradients are averaged for one update."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over updates: timm's ``create_scheduler_v2``."""

    name: str = "cosine"
    epochs: int = setting(300, 1)
    warmup_epochs: float = setting(0.0, 0)
    warmup_lr: float = setting(0.0, 0)
    """The rate at which the warm-up starts; scaled like ``optim.lr``."""
    min_lr: float = setting(0.0, 0)
    """The rate at which the decay ends; scaled like ``optim.lr``."""
    cooldown_epochs: int = setting(0, 0)
    """Epochs at ``min_lr`` after the decay, counted among ``epochs``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments: decay_epochs, decay_rate, cycle_limit, k_decay, ..."""


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights: timm's ``ModelEmaV3``."""

    decay: float | None = setting(None, 0, 1)
    """null: no average is kept."""
    warmup: bool = True
    """Increase the decay from 0, so that the average of a short run does not include its first updates."""
    warmup_gamma: float = setting(1.0, above=0)
    warmup_power: float = setting(2 / 3, above=0)


@dataclass(frozen=True)
class RunConfig:
    """Where and how the training runs. Only ``seed`` and ``precision`` change the result."""

    output: Path = setting(Path("runs/train"), free=True)
    seed: int = setting(0, 0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = setting("auto", free=True)
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP2) instead of copying them (DDP)."""
    deterministic: bool = setting(False, free=True)
    """Use deterministic CUDA kernels only, so that a resumed run equals the uninterrupted one bit for bit there too."""
    checkpoint_every_s: float = setting(1800.0, 0, free=True)
    """Seconds between checkpoints within an epoch; there is one after every epoch in any case."""
    stop_after_s: float | None = setting(None, above=0, free=True)
    """Seconds of training after which the run ends, as after its last epoch; the epoch under way is cut short. It can
    be continued with the next epoch. null: never."""
    eval_every: int = setting(1, 1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = setting(50, 1, free=True)
    """Updates between points of the trackers' curves."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"], metadata={"free": True})
    """Experiment trackers that accelerate knows: tensorboard, wandb, ..."""


@dataclass(frozen=True)
class Configuration:
    """Base of a task's configuration, a dataclass of sections; a task overrides some and adds others.

    A run saves it as ``config.yaml``, with a section ``resolved`` of the values that follow from it, which is never
    read.
    """

    PRESETS: ClassVar[str]
    """The package whose YAML files are the presets."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Keys in the ``config.yaml`` of runs of version 0.1.0, and their present names."""
    HAS_LABELS: ClassVar[bool] = False
    """Whether ``optim.label_smoothing`` applies."""

    data: ImageData = ImageData()
    model: Any = ModelExecution()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        for key_path, one, value in settings(self):
            if "range" in one.metadata:
                check_range(key_path, value, *one.metadata["range"])
        data, schedule, ema, run = self.data, self.schedule, self.ema, self.run
        if data.sizes is not None and (len(set(data.sizes)) < len(data.sizes) or data.size not in data.sizes):
            raise UsageError(
                f"data.sizes is {data.sizes}; name each size once, with data.size {data.size} among them, or leave it "
                "out to train at that size alone."
            )
        if schedule.warmup_epochs + schedule.cooldown_epochs > schedule.epochs:
            raise UsageError(
                f"schedule.epochs is {schedule.epochs}, and warm-up and cool-down alone take "
                f"{schedule.warmup_epochs + schedule.cooldown_epochs:g}; raise schedule.epochs or lower the others."
            )
        if run.fsdp and ema.decay is not None:
            raise UsageError(
                f"ema.decay is {ema.decay:g} and run.fsdp is true: timm's average needs whole weights in each "
                "process, which FSDP does not keep. Set ema.decay=null, or run.fsdp=false."
            )
        if self.optim.label_smoothing and not self.HAS_LABELS:
            raise UsageError(
                f"optim.label_smoothing is {self.optim.label_smoothing:g}, and this task has no labels to smooth; "
                "leave it out."
            )
        for name in run.trackers:
            check_choice(
                "run.trackers", name, ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive")
            )

    def changed(self, *overrides: str, **keys: Any) -> Self:
        """A copy with each ``"section.key=value"`` applied in turn, then ``**{"section.key": value}``.

        Raises:
            UsageError: an unknown key, or a value of the wrong type or out of range.
        """
        values = to_mapping(self)
        for key, value in [*map(parse_override, overrides), *keys.items()]:
            values = assigned(values, key, value)
        return self.from_values(values)

    @classmethod
    def from_values(cls, values: Any) -> Self:
        """A configuration from nested mappings, such as a YAML file's; ``resolved`` is ignored.

        Raises:
            UsageError: an unknown key, or a value of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            sections = ", ".join(one.name for one in fields(cls))
            raise UsageError(f"the configuration is {short(values)}, not a mapping with {sections}.")
        if "resolved" in values:
            values = cls._with_present_keys(values)
        return from_mapping(cls, {key: value for key, value in values.items() if key != "resolved"})

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a configuration from a YAML file, or from the preset of that name (:meth:`preset_names`).

        Raises:
            UsageError: there is no such file or preset, or its content is refused.
        """
        path = Path(source)
        if path.suffix in (".yaml", ".yml") or path.exists():
            try:
                text = read_text(path, most=_MOST_YAML)
            except OSError as error:
                raise UsageError(f"{printable(path)} cannot be read: {error.strerror or error}.") from None
        else:
            text = cls.preset_text(str(source))
        try:
            values = read_yaml(text, "the file")
            return cls.from_values({} if values is None else values)
        except UsageError as error:
            raise UsageError(f"{printable(source)}: {error}") from None

    @classmethod
    def preset_names(cls) -> list[str]:
        """The names of the presets that come with the package, sorted."""
        names = (one.name for one in files(cls.PRESETS).iterdir())
        return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))

    @classmethod
    def preset_text(cls, name: str) -> str:
        """The YAML of a preset, whose first comment describes it.

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

    def differences(self, saved: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The keys that keep a run from being resumed with this configuration: by key, the saved and the present value.

        ``saved`` is the content of the run's ``config.yaml``, ``resolved`` has the present values of that section.
        """
        free = {key_path for key_path, one, _ in settings(self) if one.metadata.get("free")} | {"resolved.processes"}
        old, new = flat(self._with_present_keys(saved)), flat({**to_mapping(self), "resolved": to_mapping(resolved)})
        # Runs of earlier versions did not save all that follows from a configuration.
        free |= {key for key in new if key.startswith("resolved.") and key not in old}
        keys = sorted((old.keys() | new.keys()) - free)
        return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}

    @classmethod
    def _with_present_keys(cls, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        for old, new in cls.RENAMED.items():
            section, _, key = old.partition(".")
            if not key and section in saved:
                saved = {**saved, new: saved[section]}
                saved.pop(section)
            elif key and isinstance(saved.get(section), Mapping) and key in saved[section]:
                rest = {name: value for name, value in saved[section].items() if name != key}
                saved = assigned({**saved, section: rest}, new, saved[section][key])
        return saved
