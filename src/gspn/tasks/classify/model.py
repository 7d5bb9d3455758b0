"""Models: built from a configuration, saved in timm's format, loaded by path or name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..._errors import UsageError, require
from ..._files import replaced, write_text
from .config import ModelConfig

if TYPE_CHECKING:
    from .config import DataConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
Fit = Literal["crop", "whole", "native"]
"""How images come to the model: resized and cropped to its input; resized alone; or at their own size."""

# Of the original weights.
_SOURCE_KEYS = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "tag", "notes", "label_names",
    "test_input_size", "test_crop_pct", "pool_size",
)  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an image into the model's input."""

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float

    def transform(self, fit: Fit = "crop") -> Any:
        """The evaluation transform, by timm: PIL image to ``[3, H, W]``.

        With ``whole`` the image is resized as for the crop, and not cropped; with ``native`` it is not resized either.
        Of an image that is stretched more than 16 times as much as the model's input, each takes the middle
        (:func:`gspn.data.trimmed`): it would pad a whole batch to its length.
        """
        composed = require("timm.data").create_transform(**asdict(self), is_training=False)
        # timm's evaluation begins with a resize and a crop.
        steps = composed.transforms[{"crop": 0, "whole": 2, "native": 2}[fit] :]
        if fit == "whole":
            from torchvision.transforms import InterpolationMode, Resize

            side = int(min(self.input_size[-2:]) / self.crop_pct)
            steps.insert(0, Resize(side, InterpolationMode(self.interpolation)))
        height, width = self.input_size[-2:]
        composed.transforms = [partial(require("gspn.data").trimmed, width=width, height=height), *steps]
        return composed


def build_model(config: ModelConfig, *, num_classes: int, size: int, sizes: Sequence[int] = ()) -> nn.Module:
    """The model of a configuration, on the CPU, for images of one size, or of several with that among them.

    Raises:
        UsageError: unknown model name, or arguments or sizes that the model does not take.
    """
    timm = import_timm()
    from ...models.saved import check_model_name

    name = config.name
    if ":" not in name:
        check_model_name(name)
    kwargs = model_kwargs(config, size)
    if config.drop_path is not None:
        kwargs["drop_path_rate"] = config.drop_path
    if config.drop is not None:
        kwargs["drop_rate"] = config.drop
    side, remedy = size, "."
    try:
        model = timm.create_model(name, pretrained=config.pretrained, num_classes=num_classes, **kwargs)
        with torch.inference_mode():
            for side in sizes or [size]:
                model.eval()(torch.zeros(1, 3, side, side))
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        # Of a model of ours with its own arguments they are bugs.
        if not config.kwargs and name.startswith("gspn") and "unexpected keyword argument" not in str(error):
            raise
        what = f"the arguments of section model, or images of {side} x {side} pixels"
        if side != size:
            remedy = (
                f"; leave {side} out of data.sizes, or make the model take it, as timm's vision transformers do with "
                "model.kwargs={dynamic_img_size: true}."
            )
        raise UsageError(f"{name} does not take {what}: {str(error).rstrip('.')}{remedy}") from error
    model.train()
    if config.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"{name} has no gradient checkpointing; set model.grad_checkpointing=false.")
        model.set_grad_checkpointing(True)
    return model


def model_kwargs(config: ModelConfig, size: int) -> dict[str, Any]:
    """The arguments that rebuild the model, besides its name and number of classes."""
    timm = import_timm()
    kwargs = dict(config.kwargs)
    if "img_size" not in kwargs and ":" not in config.name:
        cfg = timm.models.get_pretrained_cfg(config.name)
        # Models with a position embedding are built for one size.
        if cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != size:
            kwargs["img_size"] = size
    return kwargs


def import_timm() -> Any:
    """timm, with the models of this package in its registry."""
    timm = require("timm", "timm.models")
    with contextlib.suppress(ModuleNotFoundError):
        require("gspn.models")
    return timm


def resolve_preprocessing(model: nn.Module, data: DataConfig | None = None) -> Preprocessing:
    """The model's own preprocessing, overridden by the values that ``data`` sets."""
    overrides: dict[str, Any] = {}
    if data is not None:
        values = {key: getattr(data, key) for key in ("mean", "std", "interpolation", "crop_pct")}
        overrides = {"input_size": (3, data.size, data.size), **values}
    resolved = require("timm.data").resolve_data_config(overrides, model=model)  # None: the model's own
    input_size, mean, std = (tuple(resolved[key]) for key in ("input_size", "mean", "std"))
    return Preprocessing(input_size, mean, std, resolved["interpolation"], resolved["crop_pct"])


def save_config(
    directory: Path, model: nn.Module, config: ModelConfig, preprocessing: Preprocessing, label_names: Sequence[str]
) -> None:
    """Write ``config.json`` as timm's hub and ``local-dir:`` loaders read it."""
    cfg: dict[str, Any] = {k: v for k, v in pretrained_cfg(model).items() if k not in _SOURCE_KEYS}
    architecture = cfg.pop("architecture", None) or config.name.partition(".")[0]
    cfg = {key: value for key, value in cfg.items() if value is not None}
    cfg |= {**asdict(preprocessing), "num_classes": model.num_classes, "custom_load": False}
    written = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": list(label_names),
        "model_args": model_kwargs(config, preprocessing.input_size[-1]),
        "pretrained_cfg": cfg,
    }
    write_text(directory / CONFIG, json.dumps(written, indent=2))


def save_weights(directory: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` in one step, with the metadata as JSON under `gspn` in its header."""
    safetensors = require("safetensors.torch")
    # safetensors refuses tensors that share memory, so tied ones are copied.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    # One entry: several are written in a varying order, and equal weights should give equal files.
    header = {"gspn": json.dumps(dict(metadata), sort_keys=True)}
    with replaced(directory / WEIGHTS) as part:
        safetensors.save_file(tensors, part, metadata=header)


def load_model(source: str | Path) -> nn.Module:
    """Load a trained model, in evaluation mode on the CPU.

    Args:
        source: A directory with ``config.json`` and ``model.safetensors`` (a run's ``best``, or the run itself), a timm
            name with pretrained weights (``gspn_pico.mnist5k``), or an id on the Hugging Face hub
            (``hf-hub:owner/name``, or ``owner/name``).

    Raises:
        UsageError: there is no such directory or model, or no weights for it.
    """
    timm = import_timm()
    from ...models.saved import check_model_name, hub_or_cache, load_saved, refusing

    text = str(source)
    directory = Path(text.removeprefix("local-dir:"))
    if text.startswith("local-dir:") or directory.is_dir():
        folders = (directory, directory / "best", directory / "last")
        own = [one for one in folders if (one / CONFIG).is_file() and (one / WEIGHTS).is_file()]
        if not own:
            raise UsageError(
                f"{text!r} has no {CONFIG} and {WEIGHTS}; name a directory that `gspn classify train` wrote."
            )
        model = load_saved(own[0])
        if getattr(model, "num_classes", 0) < 1:
            raise UsageError(f"{text!r} holds a model without classes (num_classes 0); name a classifier.")
        return model
    if text.startswith(("hf-hub:", "hf_hub:")):
        name = text
    elif "/" in text or "\\" in text:
        if text.count("/") != 1 or text.startswith((".", "/", "~")):
            raise UsageError(f"{text!r} is not a directory.")
        name = f"hf-hub:{text}"
    else:
        check_model_name(text)
        try:
            cfg = timm.models.get_pretrained_cfg(text, allow_unregistered=False)
        except RuntimeError:
            tags = timm.list_pretrained(f"{text.partition('.')[0]}*")
            have = f"there are {', '.join(tags)}." if tags else "it has none."
            raise UsageError(f"{text!r} names pretrained weights that do not exist; {have}") from None
        if cfg is None or not cfg.has_weights:
            raise UsageError(f"{text!r} has no pretrained weights; name a directory that `gspn classify train` wrote.")
        name = text
    with refusing(text, (OSError, RuntimeError)), hub_or_cache():
        return timm.create_model(name, pretrained=True).eval()


def label_names(model: nn.Module) -> list[str] | None:
    """The class names that are stored with a trained model; None without them."""
    names = pretrained_cfg(model).get("label_names")
    if isinstance(names, Mapping):
        return [str(names.get(i, names.get(str(i), i))) for i in range(int(model.num_classes))]  # type: ignore[arg-type]
    return [str(name) for name in names] if names else None


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Timm's record of a model's weights and input."""
    return dict(getattr(model, "pretrained_cfg", None) or {})
