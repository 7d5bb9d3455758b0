"""Folders with a model of timm: ``config.json`` and weights, as ``save_for_hf`` of timm and ``gspn classify`` write."""

from __future__ import annotations

import math
import pickle
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .._errors import UsageError, nearest, require
from .._files import open_regular, printable, read_json, short

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Names that timm knows."""

# What models and loaders of timm raise when the arguments, shapes or bytes in a folder are wrong.
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, pickle.UnpicklingError,
)  # fmt: skip


def load_saved(folder: Path) -> nn.Module:
    """Load a model that was saved to a folder, in evaluation mode on the CPU.

    Raises:
        UsageError: ``config.json`` or the weights are missing, damaged, wrong, or do not fit each other.
        OSError: a file cannot be read.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UsageError(f"{printable(folder)} has no {CONFIG}; name a folder that timm or `gspn classify` saved.")
    config = read_json(path)
    where = printable(path)
    _check_config(config, where)
    kinds = _dtypes(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {}
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except _REFUSALS as error:
        # PyTorch lists every tensor that does not fit.
        what = textwrap.shorten(" ".join(str(error).split()) or type(error).__name__, 300)
        raise UsageError(f"{printable(folder)} cannot be loaded as {config['architecture']}: {what}") from None
    own = model.state_dict()
    for name, value in own.items():
        if name in kinds and value.is_floating_point() != kinds[name].startswith(("F", "BF")):
            raise UsageError(f"{printable(folder / WEIGHTS)}: {printable(name)} is {kinds[name]}, not {value.dtype}.")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(f"{printable(folder)}: the weights in {printable(name)} are not finite.")
    return model


def check_model_name(name: Any) -> None:
    """Refuse a name, or the tag of one, that is not in timm's registry."""
    plain = name.partition(".")[0] if isinstance(name, str) else ""
    if not timm.is_model(plain):
        hint = nearest(plain, timm.list_models()) or "; timm.list_models() has the names."
        raise UsageError(f"unknown model {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UsageError(f"unknown model {name!r}: {error} Leave the tag out for the default.") from None


def _dtypes(path: Path) -> dict[str, str]:
    """The dtype of each tensor of a ``.safetensors`` file, such as `F32`, from its header."""
    safetensors = require("safetensors")
    open_regular(path).close()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UsageError(f"{printable(path)} is not a whole safetensors file: {error}.") from None


def _check_config(config: Any, where: str) -> None:
    """Refuse what timm would take without a word, or fail on later."""
    if not isinstance(config, Mapping):
        raise UsageError(f"{where} is {short(config)}, not a mapping with an architecture.")
    if not isinstance(config.get("architecture"), str):
        raise UsageError(f"{where} has no architecture that is a name: {short(config.get('architecture'))}.")
    check_model_name(config["architecture"])
    split = "pretrained_cfg" in config  # older files have everything on one level
    cfg = config["pretrained_cfg"] if split else config
    arguments = config.get("model_args")
    for name, value in (("pretrained_cfg", cfg), ("model_args", {} if arguments is None else arguments)):
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: {name} is {short(value)}; it has to be a mapping.")
    classes = config.get("num_classes", cfg.get("num_classes"))
    if classes is not None and not (_whole(classes) and 0 <= classes < 2**31):
        raise UsageError(f"{where}: num_classes is {short(classes)}; it has to be a whole number, 0 or more.")
    built = (arguments or {}).get("num_classes", classes)
    if built != classes:
        raise UsageError(f"{where}: num_classes is {short(classes)}, and {short(built)} in model_args.")
    names = config.get("label_names", cfg.get("label_names"))
    if names is not None and not isinstance(names, Mapping | list):
        raise UsageError(f"{where}: label_names is {short(names)}; it has to be a list.")
    if isinstance(names, list) and classes is not None and len(names) != classes:
        raise UsageError(f"{where}: there are {len(names)} label_names for {classes} classes.")

    size = cfg.get("input_size")
    if size is not None and not (_numbers(size, 3) and all(_whole(one) and 0 < one < 2**16 for one in size)):
        raise UsageError(f"{where}: input_size is {short(size)}; it has to be [channels, height, width].")
    channels = 3 if size is None else size[0]
    for name in ("mean", "std"):
        value = cfg.get(name)
        if value is not None and not (_numbers(value, channels) and (name == "mean" or all(one > 0 for one in value))):
            least = " above 0" if name == "std" else ""
            raise UsageError(f"{where}: {name} is {short(value)}; it has to be a list of {channels} numbers{least}.")
    crop = cfg.get("crop_pct")
    if crop is not None and not (_numbers([crop], 1) and 0 < crop <= 2):
        raise UsageError(f"{where}: crop_pct is {short(crop)}; it has to be between 0 and 1.")
    interpolation = cfg.get("interpolation")
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise UsageError(
            f"{where}: interpolation is {short(interpolation)}; it has to be one of {', '.join(INTERPOLATIONS)}."
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(value: Any, count: int) -> bool:
    """Whether a value is a list of so many finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value)
    )
