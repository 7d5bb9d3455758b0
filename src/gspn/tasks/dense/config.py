"""The configuration of a training run for dense prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..._errors import UsageError
from ..core.config import setting
from ..core.sections import Configuration, ImageData, ModelExecution, RunConfig


@dataclass(frozen=True)
class DataConfig(ImageData):
    """The images and their maps."""

    name: str = "earth"
    """`earth`, `folder`, `hfds/NAME`: any name that :func:`gspn.data.open_maps` opens."""
    eval_split: str | None = "val"
    size: int = setting(256, 16, 16384)
    """Height and width of training crops in pixels."""
    batch_size: int = setting(8, 1, free=True)
    mean: tuple[float, float, float] | None = setting(None)
    """Subtracted from pixels in [0, 1]; null: the encoder's own."""
    std: tuple[float, float, float] | None = setting(None, above=0)


@dataclass(frozen=True)
class ModelConfig(ModelExecution):
    """The model: an encoder of timm and a decoder of segmentation-models-pytorch."""

    channels_last: bool = False
    name: str = "gspn_tiny"
    """The encoder, a timm model; those of :mod:`gspn.models` are registered."""
    pretrained: bool = False
    """Start from the encoder's own pretrained weights."""
    drop_path: float | None = setting(None, 0, 1)
    """Largest rate of stochastic depth in the encoder; null: its default."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the encoder."""
    decoder: str = "FPN"
    """`FPN`, `Unet`, `UPerNet`, `Segformer`, `DPT` (for plain vision transformers), ..."""
    decoder_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the decoder, such as decoder_pyramid_channels of `FPN`."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training crops; image and map are moved together."""

    scale: tuple[float, float] = setting((0.5, 2.0), above=0)
    """Smallest and largest factor that the image is enlarged by before the crop; its logarithm is drawn evenly."""
    hflip: float = setting(0.5, 0, 1)
    vflip: float = setting(0.0, 0, 1)
    color_jitter: float = setting(0.0, 0, 1)
    """Largest relative change of brightness, contrast and saturation."""
    least_labelled: float = setting(0.0, 0, 1)
    """A crop of which a smaller part is labelled is drawn again, at most ten times."""


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy for classes, the mean absolute error for numbers; neither counts ignored pixels."""

    class_weights: list[float] | Literal["balanced"] | None = setting(None, 0)
    """A weight for each class. `balanced`: the inverse square root of its share of the pixels of 64 training images,
    scaled so that the mean weight of a pixel is 1, at most 10. null: all are equal."""


@dataclass(frozen=True)
class WindowConfig:
    """Prediction of large images by overlapping windows, in evaluations."""

    window: int | None = setting(None, 0, 65536)
    """Height and width of a window in pixels; null: ``data.size``; 0: the whole image at once."""
    overlap: float = setting(0.25, 0, 0.75)
    """Part of a window that the next one covers again; the two are blended there."""


@dataclass(frozen=True)
class DenseConfig(Configuration):
    """The configuration of a training run for dense prediction: a class or a number for each pixel.

    Raises:
        UsageError: a value out of range, or two that exclude each other.

    Example:
        >>> config = DenseConfig(data=DataConfig(name="folder", root=Path("pets")))
        >>> config.model.decoder, config.data.size
        ('FPN', 256)
        >>> config.changed("augment.scale=[1, 1]").augment.scale
        (1.0, 1.0)
    """

    PRESETS: ClassVar[str] = "gspn.tasks.dense.presets"
    HAS_LABELS: ClassVar[bool] = True

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    windows: WindowConfig = WindowConfig()
    run: RunConfig = RunConfig(output=Path("runs/dense"))

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.augment.scale
        if low > high:
            raise UsageError(f"augment.scale is {[low, high]}; the first number has to be the smaller one.")
        if isinstance(self.loss.class_weights, list) and not any(self.loss.class_weights):
            raise UsageError("loss.class_weights has no weight above 0; give one, or null.")
