"""How modules compute of some rows what they would of the whole map."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from ..nn.gspn2d import GSPN2d, over_normalized_axis
from ..nn.mixer import ResponseNorm, squares
from .exchange import total

if TYPE_CHECKING:
    from .rows import ImageRows

# Pixel by pixel, or not of maps at all.
_LEAVES = (
    nn.Linear,
    nn.Identity,
    nn.Flatten,
    nn.Embedding,
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
)
_NAMES = {"diffusers.models.embeddings.Timesteps"}
# Modules that are nothing but their parts, and sums and products of their results.
_CONTAINERS = {
    "timm.layers.mlp.Mlp", "timm.layers.classifier.ClassifierHead",
    "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d", "timm.layers.layer_scale.LayerScale2d",
    "timm.models._features.FeatureListNet", "timm.models._features.FeatureGetterNet",
    "gspn.nn.block.LocalPerceptionUnit", "gspn.nn.block.GSPNBlock", "gspn.nn.mixer.GSPNMixer",
    "gspn.models.gspn.Stem", "gspn.models.gspn.Stage", "gspn.models.gspn.GSPN",
    "gspn.models.denoiser.GSPNDenoiserBlock", "gspn.models.denoiser.GSPNDenoiser2DModel",
    "diffusers.models.embeddings.TimestepEmbedding", "diffusers.models.embeddings.LabelEmbedding",
}  # fmt: skip


def replacement(name: str, module: nn.Module, rows: ImageRows) -> Callable[..., Any] | None:
    """The forward of a module for these rows; None for its own.

    Raises:
        NotImplementedError: It is not known whether the module treats each pixel by itself.
    """
    for kind, function in _FORWARDS.items():
        if type(module) is kind:
            return functools.partial(function, module, rows)
    own = f"{type(module).__module__}.{type(module).__qualname__}"
    known = (
        isinstance(module, _LEAVES)
        or own in _NAMES | _CONTAINERS
        or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1)
        or (isinstance(module, nn.Dropout) and not (module.training and module.p))
    )
    if not known:
        raise NotImplementedError(
            f"{name or 'the model'} is a {own}, and it is not known to treat each pixel by itself, so it cannot have "
            "some rows of an image. Known are convolutions, GSPN2d and what treats pixels one by one."
        )
    return None


def _propagate(module: Any, rows: ImageRows, x: Tensor, valid_size: Any = None) -> Tensor:
    # A GSPN2d: its decorator hides what it has.
    if valid_size is not None:
        raise NotImplementedError("valid_size has no meaning for rows of an image; pass whole images of one size.")
    if module.alignment != "image":
        raise NotImplementedError(f"alignment={module.alignment!r} is not computed on some rows; use 'image'.")
    of = rows.map_of(x)
    whole = torch.empty((1, 1, of.starts[-1], of.width), device="meta")
    lam_proj = over_normalized_axis(module.lam_proj, whole, module.directions, module.segment, module.reference_lines)
    return rows.propagate(
        x, module.proxy(x).to(x.dtype), module.tap_proj, lam_proj, module.u_proj, module.skip_proj, module.merge,
        directions=module.directions, segment=module.segment, impl=module.impl,
    )  # fmt: skip


def _convolve(module: nn.Conv2d, rows: ImageRows, x: Tensor) -> Tensor:
    from .rows import Map

    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise NotImplementedError(f"{module}: only numbers of rows and columns of zeros can be padded with.")
    (stride, _), (padding, _) = module.stride, module.padding
    reach, reach_w = (d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    if (reach, stride, padding) == (1, 1, 0):
        return nn.Conv2d.forward(module, x)
    of = rows.map_of(x)
    height, width = of.starts[-1], (of.width + 2 * module.padding[1] - reach_w) // module.stride[1] + 1
    out_height = (height + 2 * padding - reach) // stride + 1
    starts = (*(min(math.ceil(start / stride), out_height) for start in of.starts[:-1]), out_height)
    rows.add(Map(starts, width))
    needed = [
        (first * stride - padding, (after - 1) * stride - padding + reach)
        for first, after in itertools.pairwise(starts)
    ]
    low, high = needed[rows.rank]
    x = rows.between(x, of, [(max(first, 0), min(after, height)) for first, after in needed])
    x = F.pad(x, (0, 0, max(-low, 0), max(high - height, 0)))
    return F.conv2d(
        x, module.weight, module.bias, module.stride, (0, module.padding[1]), module.dilation, module.groups
    )


def _respond(module: ResponseNorm, rows: ImageRows, x: Tensor) -> Tensor:
    rows.map_of(x)
    sums = total(squares(x), rows.group)
    return module.scaled(x, (sums + torch.finfo(sums.dtype).tiny).sqrt().to(x.dtype))


def _pool(module: nn.AdaptiveAvgPool2d, rows: ImageRows, x: Tensor) -> Tensor:
    if module.output_size not in (1, (1, 1)):
        raise NotImplementedError(f"{module}: of some rows only the mean of the whole map is known.")
    of = rows.map_of(x)
    return total(x.sum((2, 3), keepdim=True), rows.group) / (of.starts[-1] * of.width)


def _drop_path(module: DropPath, rows: ImageRows, x: Tensor) -> Tensor:
    if not (module.training and module.drop_prob):
        return x
    # One draw for all rows: that of the first process. All draw, so that equal random states stay equal.
    drawn = DropPath.forward(module, x.new_ones((x.shape[0], 1, 1, 1)))
    return x * total(drawn if rows.rank == 0 else torch.zeros_like(drawn), rows.group)


_FORWARDS: dict[type, Callable[..., Tensor]] = {
    GSPN2d: _propagate, nn.Conv2d: _convolve, ResponseNorm: _respond, nn.AdaptiveAvgPool2d: _pool, DropPath: _drop_path,
}  # fmt: skip
