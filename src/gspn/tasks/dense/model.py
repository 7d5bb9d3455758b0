"""Models: an encoder of timm with a decoder of segmentation-models-pytorch, saved so that the latter loads them."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._errors import MissingExtraError, UsageError, nearest, require
from ..._files import printable, read_json, read_tensors, replaced, short, write_text
from ..core.config import check_range, from_mapping, to_mapping
from .config import DataConfig, ModelConfig
from .transforms import Normalization

CONFIG, WEIGHTS, TARGET = "config.json", "model.safetensors", "dense.json"
_STRIDES = {tuple(2 ** (i + first) for i in range(count)) for first in (1, 2) for count in range(2, 6)}
# Arguments of the model's constructor that this module sets, or that load something.
_OWN = {"encoder_name", "encoder_depth", "encoder_weights", "in_channels", "classes", "activation", "aux_params"}


@dataclass(frozen=True)
class Target:
    """The meaning of a model's outputs, which is saved beside its weights."""

    classes: list[str]
    """The name of each output; empty for numbers."""
    colours: list[tuple[int, int, int]]
    unit: str | None
    """The unit of the numbers; None for classes."""
    mean: float
    """A number is ``mean + std * output``."""
    std: float
    normalization: Normalization
    size: int
    """Height and width of the training crops, and of windows by default."""

    def __post_init__(self) -> None:
        if (self.unit is None) == (not self.classes) or len(self.classes) != len(self.colours):
            raise UsageError(f"{len(self.classes)} classes, {len(self.colours)} colours and unit {short(self.unit)}.")
        check_range("std", self.std, above=0)
        check_range("normalization.std", self.normalization.std, above=0)
        check_range("colours", [value for one in self.colours for value in one], 0, 255)
        check_range("size", self.size, 1, 65536)

    @property
    def outputs(self) -> int:
        """The number of channels of the model's output."""
        return len(self.classes) or 1


class DenseModel(nn.Module):
    """A model of segmentation-models-pytorch that takes images of any size.

    An image is continued at its right and lower edge up to the sides that the encoder takes, and the output is cropped.

    Args:
        core: the model.
        arguments: the arguments that build it again.
        target: the meaning of its outputs.
    """

    def __init__(self, core: nn.Module, arguments: Mapping[str, Any], target: Target) -> None:
        super().__init__()
        self.core, self.arguments, self.target = core, dict(arguments), target

    @cached_property
    def stride(self) -> int:
        """The number that both sides of the input have to be multiples of."""
        encoder: Any = self.core.encoder
        info: Any = getattr(encoder.model, "feature_info", None)
        reductions = info.reduction() if hasattr(info, "reduction") else ()
        stride = max(int(one) for one in (encoder.output_stride, *reductions))
        return 2 * stride if type(self.core).__name__ == "DPT" else stride  # it halves the last map once more

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` normalised images to logits ``[B, K, H, W]``, or to numbers before their scale."""
        height, width = images.shape[-2:]
        right, below = -width % self.stride, -height % self.stride
        if right or below:
            images = nn.functional.pad(images, (0, right, 0, below), mode="replicate")
        return self.core(images)[..., :height, :width]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass."""
        self.core.encoder.model.set_grad_checkpointing(enable)  # type: ignore[union-attr,operator]


def smp() -> Any:
    """segmentation-models-pytorch, with the models of this package in timm's registry."""
    _timm()
    return require("segmentation_models_pytorch", extra="dense")


def _timm() -> Any:
    timm = require("timm")
    require("gspn.models")
    return timm


def _saved() -> Any:
    """The module that checks files of other people; imports timm."""
    _timm()
    return require("gspn.models.saved")


def decoders() -> dict[str, Any]:
    """The models of segmentation-models-pytorch by their names."""
    return {one.__name__: one for one in smp().MODEL_ARCHITECTURES_MAPPING.values()}


def build_model(config: ModelConfig, target: Target) -> DenseModel:
    """The model of a configuration, on the CPU, tried with an image of the training's size.

    Raises:
        UsageError: an unknown encoder or decoder, arguments that they do not take, or two that do not fit.
    """
    arguments = model_arguments(config, target.outputs, target.size)
    kwargs = {} if config.drop_path is None else {"drop_path_rate": config.drop_path}
    model = _built(config.decoder, {**arguments, "encoder_weights": config.pretrained or None, **kwargs}, target)
    model.arguments = {**arguments, "_model_class": config.decoder}
    if config.grad_checkpointing:
        with _constructing(config.name, config.decoder):
            model.set_grad_checkpointing()
    return model.train()


def model_arguments(config: ModelConfig, outputs: int, size: int) -> dict[str, Any]:
    """The arguments of the decoder's class, without weights, that build a model again.

    Raises:
        UsageError: an unknown encoder or decoder, or an encoder whose maps the decoders do not take.
    """
    known = decoders()
    if config.decoder not in known:
        raise UsageError(f"unknown decoder {config.decoder!r}{nearest(config.decoder, known)}")
    _saved().check_model_name(config.name)
    timm = _timm()
    kwargs = dict(config.kwargs)
    cfg = timm.models.get_pretrained_cfg(config.name)
    # Models with a position embedding are built for one size; they take others where timm lets them.
    if cfg is not None and cfg.fixed_input_size and "img_size" not in kwargs:
        kwargs["img_size"] = size
    arguments = {**config.decoder_kwargs}
    wrong = sorted((_OWN & arguments.keys()) | ({"encoder_weights"} & kwargs.keys()))
    if wrong:
        raise UsageError(f"model.decoder_kwargs has {wrong[0]}, which follows from other keys; leave it out.")
    if config.decoder != "DPT":
        arguments["encoder_depth"] = _depth(config.name, kwargs, config.decoder)
        parameters = inspect.signature(known[config.decoder].__init__).parameters
        channels = parameters["decoder_channels"].default if "decoder_channels" in parameters else None
        if isinstance(channels, tuple | list) and "decoder_channels" not in arguments:
            arguments["decoder_channels"] = list(channels[-arguments["encoder_depth"] :])
    return {
        "encoder_name": f"tu-{config.name}", "encoder_weights": None, "classes": outputs, "in_channels": 3,
        **arguments, **kwargs,
    }  # fmt: skip


def _depth(name: str, kwargs: Mapping[str, Any], decoder: str) -> int:
    """The number of halvings that segmentation-models-pytorch counts in an encoder."""
    timm = _timm()
    with _constructing(name, decoder), torch.device("meta"):
        try:
            strides, usual = (
                tuple(timm.create_model(name, features_only=True, **one).feature_info.reduction())
                for one in (kwargs, {})
            )
        except NotImplementedError:
            strides = usual = tuple(timm.create_model(name, features_only=True, **kwargs).feature_info.reduction())
    if strides not in _STRIDES:
        remedy = "a plain vision transformer takes model.decoder=DPT" if len(set(strides)) == 1 else "take another"
        raise UsageError(f"{name} has maps at 1/{', 1/'.join(map(str, strides))} of the image; {remedy}.")
    if strides[0] != usual[0]:
        raise UsageError(
            f"{name} with model.kwargs has its first map at 1/{strides[0]} of the image, and without at 1/{usual[0]}, "
            "which is what segmentation-models-pytorch takes it for; leave the stem as it is."
        )
    return len(strides) + (strides[0] == 4)


@contextmanager
def _constructing(name: str, decoder: str) -> Iterator[None]:
    """Errors of constructors that a person's arguments cause, in one line."""
    try:
        yield
    except (UsageError, MissingExtraError):
        raise
    except _saved().CONSTRUCTOR as error:
        reason = textwrap.shorten(" ".join(str(error).split()), 200)
        raise UsageError(
            f"{name} with the decoder {decoder} does not take these arguments of section model, or images of this "
            f"size: {reason}"
        ) from error


def _built(decoder: str, arguments: Mapping[str, Any], target: Target) -> DenseModel:
    name = str(arguments["encoder_name"]).removeprefix("tu-")
    with _constructing(name, decoder):
        core = decoders()[decoder](**arguments)
        model = DenseModel(core, arguments, target).eval()
        with torch.inference_mode():
            shape = tuple(model(torch.zeros(1, 3, target.size, target.size)).shape)
    if shape != (1, target.outputs, target.size, target.size):
        raise UsageError(
            f"{name} with the decoder {decoder} makes {shape[2]} x {shape[3]} pixels of {target.size} x {target.size}; "
            "set upsampling in model.decoder_kwargs, or take another decoder."
        )
    return model


def resolve_normalization(config: ModelConfig, data: DataConfig) -> Normalization:
    """The encoder's own normalisation, overridden by the values that ``data`` sets."""
    _saved().check_model_name(config.name)
    cfg = _timm().models.get_pretrained_cfg(config.name)
    if cfg is None:  # a model that somebody registered without one
        constants = require("timm.data")
        own: Any = constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD
    else:
        own = cfg.mean, cfg.std
    return Normalization(data.mean or tuple(own[0]), data.std or tuple(own[1]))


# --- Files ------------------------------------------------------------------------------------------------------------


def save_model(directory: Path, model: DenseModel, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors`` as segmentation-models-pytorch reads them, and ``dense.json``."""
    # The names of the inner model, which is what others load.
    tensors = {name.removeprefix("core."): tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_text(directory / CONFIG, json.dumps(model.arguments, indent=2))
    write_text(directory / TARGET, json.dumps(to_mapping(asdict(model.target)), indent=2))
    with replaced(directory / WEIGHTS) as part:
        # One entry: several are written in a varying order, and equal weights should give equal files.
        header = {"gspn": json.dumps(dict(metadata), sort_keys=True)}
        require("safetensors.torch").save_file(tensors, part, metadata=header)


def find_model(source: str | Path) -> Path | None:
    """The directory of the trained model that ``load_model(source)`` loads; None without one."""
    for folder in (Path(source), Path(source, "best"), Path(source, "last")):
        if all((folder / name).is_file() for name in (CONFIG, WEIGHTS, TARGET)):
            return folder
    return None


def load_model(source: str | Path) -> DenseModel:
    """Load a trained model, in evaluation mode on the CPU.

    Args:
        source: The directory of a run, or its ``best`` or ``last``.

    Raises:
        UsageError: the directory does not exist, or its files are missing, damaged or of another model.
    """
    library, folder = smp(), find_model(source)
    if folder is None:
        raise UsageError(
            f"{printable(source)!r} has no {CONFIG}, {WEIGHTS} and {TARGET}; name a directory that `gspn dense train` "
            "wrote."
        )
    target, config, saved = _target(folder / TARGET), read_json(folder / CONFIG), _saved()
    where, header = printable(folder / CONFIG), saved.read_header(folder / WEIGHTS)
    if not isinstance(config, Mapping):
        raise UsageError(f"{where} is {short(config)}, not a mapping.")
    arguments = dict(config)
    decoder, name = arguments.pop("_model_class", None), arguments.get("encoder_name")
    if not isinstance(decoder, str) or decoder not in decoders():
        raise UsageError(f"{where}: _model_class is {short(decoder)}, not one of {', '.join(decoders())}.")
    if not isinstance(name, str) or not name.startswith("tu-"):
        raise UsageError(f"{where}: encoder_name is {short(name)}; it has to be tu- and the name of a timm model.")
    saved.check_model_name(name.removeprefix("tu-"))
    if arguments.get("encoder_weights") is not None or arguments.get("aux_params") is not None:
        raise UsageError(f"{where}: encoder_weights and aux_params have to be null; set them so.")
    arguments["encoder_weights"] = None  # where it is missing, the constructor would download some
    refused = _LOADING.intersection(arguments)
    if refused:
        raise UsageError(f"{where} has {min(refused)}, an option of timm's factory and not of a model; remove it.")
    if arguments.get("classes") != target.outputs:
        raise UsageError(f"{where}: classes is {short(arguments.get('classes'))}, and {TARGET} has {target.outputs}.")
    saved.check_numbers(arguments, where, len(header))
    built = None
    with suppress(*saved.CONSTRUCTOR), torch.device("meta"):  # where some models cannot be built
        built = getattr(library, decoder)(**arguments)
    if built is not None:
        saved.check_size(built, header, folder)
    with saved.refusing(folder, saved.CONSTRUCTOR):
        core = getattr(library, decoder)(**arguments)
        core.load_state_dict(read_tensors(folder / WEIGHTS))
    saved.check_weights(core, header, folder)
    return DenseModel(core.eval(), {**arguments, "_model_class": decoder}, target).eval()


# Arguments of timm's factory: they change what is loaded from where.
_LOADING = {
    "cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_filter_fn", "pretrained_strict", "scriptable", "exportable", "no_jit",
}  # fmt: skip


def _target(path: Path) -> Target:
    try:
        return from_mapping(Target, read_json(path))
    except UsageError as error:
        raise UsageError(f"{printable(path)}: {error}") from None
