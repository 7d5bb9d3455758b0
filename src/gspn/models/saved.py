"""Folders that somebody else saved models to: what their files are checked for, and how models of timm are loaded.

``save_for_hf`` of timm and ``gspn classify`` write ``config.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import math
import re
import socket
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .._errors import MissingExtraError, UsageError, nearest, require
from .._files import open_tensors, printable, read_json, short

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Names that timm knows."""

CONSTRUCTOR: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""The errors that constructors of other libraries raise where a value in a file is of another type or out of range."""

Header = Mapping[str, tuple[str, list[int]]]
"""The dtype and the shape of each tensor of a file of weights, by name."""

# Arguments of timm's factory: they change what is loaded from where, and what is left random.
_FACTORY = {
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "features_only", "kwargs_filter",
    "no_jit", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_model_args",
    "pretrained_strict", "scriptable",
}  # fmt: skip
_MOST = 1 << 20  # of any integer in a configuration: beyond all channels, tokens and timesteps
_MOST_SIDE = 1 << 11  # pixels of a latent: position embeddings are computed for all of them
_LAYERS = re.compile("layers|depth")
_FREE = 1 << 20  # numbers that a model may have beyond its weights' before it counts as absurd


@contextmanager
def refusing(source: Path | str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Report in one line what another library raises about the files of ``source``, where it is one of ``errors``.

    Raises:
        UsageError: One of them was raised in the block.
    """
    try:
        yield
    except (UsageError, MissingExtraError):
        raise
    except (*errors, require("safetensors").SafetensorError) as error:
        # PyTorch lists every tensor that does not fit.
        reason = printable(textwrap.shorten(" ".join(str(error).split()) or type(error).__name__, 300))
        is_hub = isinstance(source, str)
        remedy = (
            "check its name and the connection" if is_hub else "replace the damaged file, or name another directory"
        )
        raise UsageError(f"'{printable(source)}' cannot be loaded: {reason}; {remedy}.") from error


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within the block the hub is asked, or its cache alone where it cannot be reached.

    Its client would try for half a minute, and say each try.
    """
    constants: Any = require("huggingface_hub").constants
    url, before = urllib.parse.urlsplit(constants.ENDPOINT), constants.HF_HUB_OFFLINE
    try:
        if not before and not urllib.request.getproxies():
            port = url.port or (80 if url.scheme == "http" else 443)
            socket.create_connection((url.hostname, port), timeout=10).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_header(file: Path) -> Header:
    """The dtype, such as `F32`, and the shape of each tensor of a ``.safetensors`` file.

    Raises:
        UsageError: It is damaged.
        OSError: It cannot be read, or is not a regular file.
    """
    with open_tensors(file) as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  (not a mapping)
        return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}


def check_numbers(config: Mapping[str, Any], where: str, tensors: float) -> None:
    """Refuse a configuration whose numbers make a constructor run for ever: a layer has at least one tensor."""
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        key, value = pending.pop()
        most = _MOST_SIDE if key == "sample_size" else min(_MOST, tensors) if _LAYERS.search(key) else _MOST
        # Schedulers have a limit at -inf.
        if (isinstance(value, int) and abs(value) > most) or (isinstance(value, float) and math.isnan(value)):
            raise UsageError(f"{where} has {short(key)} = {short(value)}; correct it.")
        if isinstance(value, list | dict):
            if len(value) > tensors + 100:
                raise UsageError(f"{where} has {len(value):,} entries in {short(key)}; correct it.")
            pending += value.items() if isinstance(value, dict) else ((key, one) for one in value)


def check_size(model: nn.Module, header: Header, folder: Path) -> None:
    """Refuse a model, built on the meta device, that is much larger than the weights beside its configuration."""
    present = sum(math.prod(shape) for _, shape in header.values())
    described = sum(tensor.numel() for tensor in model.state_dict().values())
    if described > 2 * present + _FREE:
        raise UsageError(
            f"'{printable(folder)}': {CONFIG} describes {described:,} weights, and {present:,} are there; one of the "
            "two files belongs to another model."
        )


def check_weights(model: nn.Module, header: Header, folder: Path) -> None:
    """Refuse weights that were saved as integers, or are not finite: loading converts the first, and lets both pass."""
    for name, value in model.state_dict().items():
        kind = header.get(name, ("F32", []))[0]
        if value.is_floating_point() and not kind.startswith(("F", "BF")):
            raise UsageError(f"'{printable(folder)}': the weights in {printable(name)} are {kind}, not {value.dtype}.")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(f"'{printable(folder)}': the weights in {printable(name)} are not finite.")


def load_saved(folder: Path) -> nn.Module:
    """Load a model of timm that was saved to a folder, in evaluation mode on the CPU; of a run, its best.

    Raises:
        UsageError: ``config.json`` or the weights are missing, damaged, wrong, or do not fit each other.
        OSError: a file cannot be read.
    """
    if not (folder / CONFIG).exists() and (folder / "best" / CONFIG).exists():
        folder = folder / "best"
    path = folder / CONFIG
    for file in (path, folder / WEIGHTS):
        if not file.exists():
            raise UsageError(
                f"{printable(folder)} has no {file.name}; name a folder that `gspn classify` saved, or timm with "
                "safe_serialization=True."
            )
    config, header = read_json(path), read_header(folder / WEIGHTS)
    _check_config(config, printable(path))
    arguments = config.get("model_args") or {}
    check_numbers(arguments, printable(path), len(header))
    built = None
    with suppress(*CONSTRUCTOR), torch.device("meta"):  # where some models cannot be built
        built = timm.create_model(config["architecture"], **arguments)
    if built is not None:
        check_size(built, header, folder)
    with refusing(folder, CONSTRUCTOR):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    check_weights(model, header, folder)
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


def _check_config(config: Any, where: str) -> None:
    """Refuse what timm would take without a word, or fail on later."""
    if not isinstance(config, Mapping):
        raise UsageError(f"{where} is {short(config)}, not a mapping with an architecture.")
    check_model_name(config.get("architecture"))
    cfg = config.get("pretrained_cfg", config)  # older files have everything on one level
    arguments = config.get("model_args")
    arguments = {} if arguments is None else arguments
    for name, value in (("pretrained_cfg", cfg), ("model_args", arguments)):
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: {name} is {short(value)}; it has to be a mapping.")
    refused = _FACTORY.intersection(arguments)
    if refused:
        raise UsageError(
            f"{where}: model_args has {min(refused)}, an option of timm's factory and not of a model; remove it."
        )
    classes, names = (config.get(name, cfg.get(name)) for name in ("num_classes", "label_names"))
    built, size = arguments.get("num_classes", classes), cfg.get("input_size")
    channels = size[0] if _numbers(size, 3) else 3

    def is_whole(value: Any, least: int, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < most

    for name, value, fits, what in (
        ("num_classes", classes, lambda one: is_whole(one, 0, 2**31), "a whole number, 0 or more"),
        ("num_classes in model_args", built, lambda one: one == classes, f"{short(classes)}, as outside"),
        ("label_names", names, lambda one: isinstance(one, Mapping | list), "a list"),
        ("label_names", names, lambda one: not isinstance(one, list) or classes in (None, len(one)),
         f"a list of {short(classes)}, one for each class"),
        ("input_size", size, lambda one: _numbers(one, 3) and all(is_whole(side, 1, 2**16) for side in one),
         "[channels, height, width]"),
        ("mean", cfg.get("mean"), lambda one: _numbers(one, channels), f"a list of {channels} numbers"),
        ("std", cfg.get("std"), lambda one: _numbers(one, channels) and min(one) > 0,
         f"a list of {channels} numbers above 0"),
        ("crop_pct", cfg.get("crop_pct"), lambda one: _numbers([one], 1) and 0 < one <= 2, "between 0 and 1"),
        ("interpolation", cfg.get("interpolation"), lambda one: one in INTERPOLATIONS,
         f"one of {', '.join(INTERPOLATIONS)}"),
    ):  # fmt: skip
        if value is not None and not fits(value):
            raise UsageError(f"{where}: {name} is {short(value)}; it has to be {what}.")


def _numbers(value: Any, count: int) -> bool:
    """Whether a value is a list of so many finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value)
    )
