"""The configurations of text to image: of training a UNet, and of distilling an adapter from one."""

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


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from: images with captions, encoded once and kept."""

    name: str = "emoji"
    """`emoji`, `folder`, `wds`, `hfds/NAME`: what :func:`gspn.data.open_captions` opens."""
    root: Path | None = None
    """Where the data lie, for those that do not come with the package."""
    train_split: str = "train"
    eval_split: str | None = None
    """Images whose loss is measured after every epoch; null for none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of :func:`gspn.data.open_captions`."""
    size: int = 512
    """Height and width of an image; smaller ones are enlarged, others cropped at the middle."""
    hflip: float = 0.0
    """Probability of mirroring an image."""
    cache: Path | None = None
    """Where latents and encoded captions are kept, for this run and others with the same; null: in the run."""
    batch_size: int = 8
    """Images in one forward pass of one process."""
    encode_batch_size: int = 16
    """Images that the autoencoder encodes at a time."""
    workers: int = 4
    """Processes that load, for each training process; 0 loads in the training process."""


@dataclass(frozen=True)
class UNetConfig:
    """The UNet that is trained."""

    pipeline: str | None = None
    """A text-to-image pipeline, by path, hub id or name, whose UNet is trained further; the rest of it stays."""
    vae: str | None = None
    """Without a pipeline: an ``AutoencoderKL``, by path or hub id."""
    text: str = "minilm"
    """Without a pipeline: `minilm` (:func:`~.pipelines.minilm`), or a pipeline whose text encoder is taken."""
    options: dict[str, Any] = field(default_factory=dict)
    """Without a pipeline: arguments of ``UNet2DConditionModel``."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = True
    compile: bool = False
    """``torch.compile`` the network."""


@dataclass(frozen=True)
class NoiseConfig:
    """What is predicted, of what noise: Stable Diffusion's chain of steps."""

    objective: Literal["epsilon", "v_prediction"] = "epsilon"
    timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    caption_dropout: float = 0.1
    """Probability of leaving a caption out, for classifier-free guidance."""


@dataclass(frozen=True)
class SamplesConfig:
    """The images that are drawn as the model learns, always from the same noise."""

    every: int = 5
    """Epochs between them; after the last in any case. 0: none."""
    prompts: list[str] = field(default_factory=list)
    """What is drawn; empty for captions of the data, evenly spread."""
    number: int = 8
    """Of such captions."""
    steps: int = 30
    guidance: float = 5.0


@dataclass(frozen=True)
class ResolvedTextToImage(Resolved):
    """What follows from the rest; computed anew in each run, and never read."""

    captions: int
    latent_shape: list[int]
    latents: str
    """A digest of the latents."""
    text: str
    """A digest of the text encoders."""
    unet: str
    """A mark of the weights that were there before: what is trained further, or the teacher's."""


@dataclass(frozen=True)
class TextToImageConfig(Configuration):
    """A whole training run of a text-to-image UNet.

    Args: the sections below, each a dataclass of its own with a default for every key.

    Raises:
        UsageError: a value out of its range, or two that exclude each other.

    Example:
        >>> TextToImageConfig.load("emoji64").data.size
        64
    """

    PRESETS: ClassVar[str] = "gspn.tasks.text_to_image.train.presets"

    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(epochs=100))
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.9999))
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/t2i")))
    resolved: ResolvedTextToImage | None = None

    def __post_init__(self) -> None:
        check_training(self.optim, self.schedule, self.ema, self.run)
        _check_shared(self.data, self.samples, self.optim)
        model, noise = self.model, self.noise
        check_range("noise.timesteps", noise.timesteps, 2)
        check_range("noise.caption_dropout", noise.caption_dropout, 0, 1)
        if not 0 < noise.beta_start < noise.beta_end < 1:
            raise UsageError(
                f"noise.beta_start is {noise.beta_start:g} and noise.beta_end {noise.beta_end:g}; they have to rise, "
                "between 0 and 1."
            )
        if model.pipeline is not None and (model.vae is not None or model.options):
            raise UsageError(
                f"model.pipeline is {model.pipeline!r}, which has an autoencoder and a UNet; leave model.vae and "
                "model.options out."
            )


@dataclass(frozen=True)
class AdapterConfig:
    """The student: the teacher's UNet with GSPN in the place of its self-attention."""

    layers: list[str] | None = None
    """Levels or names of modules; null for all: see :meth:`gspn.diffusers.GSPNAdapter.from_model`."""
    proxy_dim: int | None = None
    """null: an eighth of each layer's width."""
    groups: int | None = None
    """null: taps for each channel; 1: shared taps."""
    segment: int | None = None
    """null: global scans."""
    segments: dict[str, int | None] = field(default_factory=dict)
    """Segments by level, in the place of ``segment``."""
    skip: bool = True
    proxy_bias: bool = True
    """Let taps and gates have a constant part, which `fit` needs."""
    initialize: Literal["fit", "copy", "random"] = "fit"
    """`random`; `copy`: from the teacher's ``to_v`` and ``to_out``; `fit`: copies, and constant gates by least squares
    against the attention: :func:`~.initialization.fit_gates`."""
    resume_from: str | None = None
    """An adapter, by path, hub id or name, to go on from, in the place of all that."""
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the frozen weights of the teacher are kept in; the adapter's are fp32, and ``run.precision`` has to be less
    as well."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = True
    compile: bool = False
    """``torch.compile`` teacher and student."""


@dataclass(frozen=True)
class DistillationConfig:
    """The loss: weights of its terms, and how long each layer learns by itself first."""

    noise: float = 1.0
    """Of the squared error against the noise, or what else the teacher predicts."""
    teacher: float = 0.5
    """Of that against the teacher's prediction."""
    attention: float = 0.5
    """Of that of the attentions' outputs, a mean over the layers."""
    relative: bool = False
    """Divide each layer's by the mean square of the attention's output, so that all layers count alike."""
    caption_dropout: float = 0.1
    """Probability of leaving a caption out, as guidance will."""
    block_epochs: int = 0
    """Epochs at the start in which every layer alone learns the attention's output of the attention's own input."""


@dataclass(frozen=True)
class DistillConfig(Configuration):
    """A whole distillation run.

    Args: the sections below, each a dataclass of its own with a default for every key.

    Raises:
        UsageError: a value out of its range, or two that exclude each other.

    Example:
        >>> DistillConfig.load("emoji64").distillation.attention
        0.5
    """

    PRESETS: ClassVar[str] = "gspn.tasks.text_to_image.distill.presets"

    teacher: str = "gspn_text_to_image.emoji64"
    """A text-to-image pipeline, by path, hub id or name."""
    data: DataConfig = field(default_factory=DataConfig)
    model: AdapterConfig = field(default_factory=AdapterConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, lr_base_batch=None, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(epochs=20))
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.999))
    run: RunConfig = field(default_factory=lambda: RunConfig(output=Path("runs/distill")))
    resolved: ResolvedTextToImage | None = None

    def __post_init__(self) -> None:
        check_training(self.optim, self.schedule, self.ema, self.run)
        _check_shared(self.data, self.samples, self.optim)
        loss = self.distillation
        for key in ("noise", "teacher", "attention"):
            check_range(f"distillation.{key}", getattr(loss, key), 0)
        check_range("distillation.caption_dropout", loss.caption_dropout, 0, 1)
        check_range("distillation.block_epochs", loss.block_epochs, 0)
        if loss.noise == loss.teacher == loss.attention == 0:
            raise UsageError("distillation.noise, .teacher and .attention are all 0: nothing is learnt; set one above.")
        if loss.block_epochs > self.schedule.epochs:
            raise UsageError(
                f"distillation.block_epochs is {loss.block_epochs}, and schedule.epochs {self.schedule.epochs}; the "
                "former are among the latter."
            )
        if self.model.initialize == "fit" and not self.model.proxy_bias:
            raise UsageError(
                "model.initialize is 'fit' and model.proxy_bias false: constant gates need it. Set "
                "model.initialize=copy, or model.proxy_bias=true."
            )
        if self.model.weights != "fp32" and self.run.precision == "fp32":
            raise UsageError(
                f"model.weights is {self.model.weights!r} and run.precision 'fp32': the adapter, in fp32 beside them, "
                f"needs autocast. Set run.precision={self.model.weights}, or model.weights=fp32."
            )
        if self.model.segment is not None and self.model.segments:
            raise UsageError(
                f"model.segment is {self.model.segment} and model.segments {self.model.segments}; give the one or the "
                "other."
            )


def _check_shared(data: DataConfig, samples: SamplesConfig, optim: OptimConfig) -> None:
    for place, value, least in (
        ("data.size", data.size, 1),
        ("data.batch_size", data.batch_size, 1),
        ("data.encode_batch_size", data.encode_batch_size, 1),
        ("data.workers", data.workers, 0),
        ("samples.every", samples.every, 0),
        ("samples.number", samples.number, 1),
        ("samples.steps", samples.steps, 1),
        ("samples.guidance", samples.guidance, 0),
    ):
        check_range(place, value, least)
    check_range("data.hflip", data.hflip, 0, 1)
    if optim.label_smoothing:
        raise UsageError(
            f"optim.label_smoothing is {optim.label_smoothing:g}: there are no labels to smooth. Leave it out."
        )
