"""Conversion of state dicts of the authors' official classifier."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import UsageError

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
    for wrapper in ("model_ema", "state_dict_ema", "model", "state_dict"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
            break
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
