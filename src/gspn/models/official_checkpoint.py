"""The authors' official classifiers: their files read, and their weights converted to :class:`gspn.models.GSPN`."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._errors import UsageError
from .._files import open_regular, printable, read_tensors, short

if TYPE_CHECKING:
    from .gspn import GSPN

PUBLISHED = {"gspn_tiny": 83.0, "gspn_small": 83.8, "gspn_base": 84.3}
"""Top-1 accuracy on ImageNet-1K in percent, as the paper states it (arXiv 2501.12381)."""

# The official projections hold the directions in the order right, down, left, up. Entry d is the index at which they
# hold gspn.DIRECTIONS[d].
_OFFICIAL_ORDER = (1, 3, 0, 2)

# Official modules and ours, for parameters that keep their values.
_OUTSIDE_BLOCKS = {
    "patch_embed.0": "stem.conv1",
    "patch_embed.2": "stem.norm1",
    "patch_embed.5": "stem.conv2",
    "patch_embed.7": "stem.norm2",
    "classifier.norm": "norm",
    "classifier.head": "head.fc",
}
_IN_BLOCKS = {
    "norm": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "op.in_proj": "mixer.in_proj",
    "op.conv2d": "mixer.conv_dw",
    "op.x_conv_down": "mixer.gspn.proxy",
    "op.out_norm": "mixer.norm",
    "op.grn": "mixer.grn",
    "op.out_proj": "mixer.out_proj",
}
_DOWNSAMPLE = {"1": "conv", "3": "norm"}
_LEAVES = {"gamma": "weight", "beta": "bias"}

_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)\.(\w+)")
_BETWEEN = re.compile(r"layers\.(\d+)\.downsample\.(\d+)\.(\w+)")

# Official files hold a configuration object of yacs beside the weights, which a safe load would refuse. It is read as a
# plain mapping: none of its code runs, and yacs is not needed.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Convert a state dict to the layout of :class:`gspn.models.GSPN`.

    timm calls this function for every source of weights, be it a local file, a URL or a hub id:
    ``timm.create_model("gspn_tiny", pretrained=True, pretrained_cfg_overlay=dict(file="gspn_tiny.pth"),
    alignment="official")``.

    Args:
        state_dict: the weights of this class, or of the authors' classifier (keys such as
            ``layers.i.blocks.j.op.x_conv_down.weight``). Either may be wrapped in ``model_ema``, ``model`` or
            ``state_dict``; the first of these takes precedence.
        model: the model that the weights are for.

    Returns:
        A new mapping with the names and shapes of ``model``.

    Raises:
        ValueError: the weights are the official classifier's and ``model`` has another alignment, or a parameter is
            unknown; UsageError where the weights are not named tensors.
    """
    wrapper = _wrapper(state_dict)
    if wrapper is not None:
        state_dict = state_dict[wrapper]
    for name, one in state_dict.items():
        if not isinstance(name, str) or not torch.is_tensor(one):
            raise UsageError(f"the checkpoint has {type(one).__name__} at {name!r}; weights are named tensors.")
    if not any(".op.x_conv_down." in name for name in state_dict):
        return dict(state_dict)
    for name, module in model.named_modules():
        if getattr(module, "alignment", "official") != "official":
            raise ValueError(
                f"these weights were trained with the misaligned scans of the official code, and {name} has "
                f"alignment={module.alignment!r}; create the model with alignment='official'."
            )
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    result = {}
    for name, value in state_dict.items():
        ours, converted = _convert(name, value)
        # Official linear layers are 1x1 convolutions here, and official vectors have additional axes of length one.
        if ours in shapes and converted.numel() == shapes[ours].numel():
            converted = converted.reshape(shapes[ours])
        result[ours] = converted
    return result


def _wrapper(content: Mapping[str, Any]) -> str | None:
    """The name under which a file has its weights; None where they are not wrapped."""
    names = ("model_ema", "state_dict_ema", "model", "state_dict")
    return next((name for name in names if isinstance(content.get(name), Mapping)), None)


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The contents of a file that the authors' training wrote."""

    weights: Mapping[str, Tensor]
    """By their official names."""
    wrapper: str | None
    """The name under which the file has them; `model_ema` is the average over the training."""
    facts: Mapping[str, str]
    """The numbers and texts that the file has beside its weights, such as `epoch` and `max_accuracy`."""
    left_out: tuple[str, ...]
    """Everything else in the file, such as `optimizer`."""

    @property
    def num_classes(self) -> int:
        """The number of classes that the weights tell apart."""
        return len(self.weights["classifier.head.weight"])


def read_official(path: Path) -> OfficialCheckpoint:
    """Read an official file, a state dict or what the training wrote, as ``.pth`` or ``.safetensors``.

    No code in the file is run.

    Raises:
        UsageError: The file is damaged, has objects that are not plain data, or has other weights.
        OSError: It cannot be read, or is not a regular file.

    Example:
        >>> read_official(Path("tiny.pth")).num_classes  # doctest: +SKIP
        1000
    """
    if path.suffix == ".safetensors":
        content: Any = read_tensors(path)
    else:
        try:
            with open_regular(path) as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
            raise UsageError(f"'{printable(path)}' cannot be read as a PyTorch checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"'{printable(path)}' has {short(content)}, not a mapping with weights.")
    wrapper = _wrapper(content)
    weights = content if wrapper is None else content[wrapper]
    if not torch.is_tensor(weights.get("classifier.head.weight")):
        raise UsageError(
            f"'{printable(path)}' has no tensor 'classifier.head.weight'; only the authors' classifiers can be "
            "converted. Weights of gspn itself load with timm.create_model."
        )
    others = {} if wrapper is None else {key: value for key, value in content.items() if key != wrapper}
    facts = {str(key): short(value) for key, value in others.items() if isinstance(value, int | float | str)}
    left_out = tuple(printable(key) for key in others if key not in facts)
    return OfficialCheckpoint(weights, wrapper, facts, left_out)


def official_model(name: str, checkpoint: OfficialCheckpoint, **options: Any) -> GSPN:
    """The model ``name`` with official weights, in evaluation mode. Weights and parameters have to match one to one.

    Args:
        name: A model of timm's registry, such as `gspn_tiny`.
        checkpoint: The weights.
        options: Further arguments of the model.

    Raises:
        UsageError: The weights are not those of ``name``, or are not finite; the first of them is named.

    Example:
        >>> official_model("gspn_tiny", read_official(Path("tiny.pth")))  # doctest: +SKIP
        GSPN(...)
    """
    import timm

    model = timm.create_model(name, num_classes=checkpoint.num_classes, alignment="official", **options)
    try:
        weights = checkpoint_filter_fn(checkpoint.weights, model)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in sorted(expected.keys() | weights.keys()):
        present = tuple(weights[key].shape) if key in weights else "missing"
        if present != expected.get(key):
            raise UsageError(
                f"these are not the weights of {name}: {printable(key)} is {present}, and has to be "
                f"{expected.get(key, 'absent')}; name the model that they were trained for."
            )
        if not bool(weights[key].isfinite().all()):
            raise UsageError(f"the weights in {key} are not finite; the file is damaged.")
    model.load_state_dict(weights)
    return model.eval()  # type: ignore[return-value]


def _convert(name: str, value: Tensor) -> tuple[str, Tensor]:
    if match := _BLOCK.fullmatch(name):
        stage, block, module, leaf = match.groups()
        prefix = f"stages.{stage}.blocks.{block}."
        if module in _IN_BLOCKS:
            return f"{prefix}{_IN_BLOCKS[module]}.{_LEAVES.get(leaf, leaf)}", value
        if module == "op.w_conv_up":
            # [3, 4, C, S] in memory: tap, direction, channel.
            taps = value.flatten(1).unflatten(0, (3, 4, -1))[:, list(_OFFICIAL_ORDER)]
            return f"{prefix}mixer.gspn.tap_proj", taps.permute(1, 2, 0, 3).contiguous()
        if module == "op.m_conv":
            return f"{prefix}mixer.gspn.merge", value.flatten()[list(_OFFICIAL_ORDER)]
        gates = {"op.l_conv_up": "lam_proj", "op.u_conv_up": "u_proj", "op.d_conv": "skip_proj"}
        if module in gates:
            return f"{prefix}mixer.gspn.{gates[module]}", value.flatten(1).unflatten(0, (4, -1))[list(_OFFICIAL_ORDER)]
    elif match := _BETWEEN.fullmatch(name):
        # The downsampling is the end of a stage in the official layout and the beginning of the next one here.
        stage, module, leaf = match.groups()
        if module in _DOWNSAMPLE:
            return f"stages.{int(stage) + 1}.downsample.{_DOWNSAMPLE[module]}.{leaf}", value
    else:
        module, _, leaf = name.rpartition(".")
        if module in _OUTSIDE_BLOCKS:
            return f"{_OUTSIDE_BLOCKS[module]}.{leaf}", value
    raise ValueError(f"unknown parameter {name!r} {tuple(value.shape)} in a state dict of the official layout.")
