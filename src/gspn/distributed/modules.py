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
from .exchange import gathered, total

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
    "gspn.nn.compact.CompactGSPN2d",
    "gspn.models.gspn.Stem", "gspn.models.gspn.Stage", "gspn.models.gspn.GSPN",
    "gspn.models.denoiser.GSPNDenoiserBlock", "gspn.models.denoiser.GSPNDenoiser2DModel",
    "diffusers.models.embeddings.TimestepEmbedding", "diffusers.models.embeddings.LabelEmbedding",
    "gspn.diffusers.token_mixer.GSPNTokenMixer", "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
    "diffusers.models.unets.unet_2d_blocks.DownBlock2D", "diffusers.models.unets.unet_2d_blocks.UpBlock2D",
    "diffusers.models.unets.unet_2d_blocks.CrossAttnDownBlock2D",
    "diffusers.models.unets.unet_2d_blocks.CrossAttnUpBlock2D",
    "diffusers.models.unets.unet_2d_blocks.UNetMidBlock2D",
    "diffusers.models.unets.unet_2d_blocks.UNetMidBlock2DCrossAttn",
    "diffusers.models.resnet.ResnetBlock2D", "diffusers.models.transformers.transformer_2d.Transformer2DModel",
    "diffusers.models.attention.BasicTransformerBlock", "diffusers.models.attention.FeedForward",
    "diffusers.models.activations.GEGLU", "diffusers.models.activations.GELU",
}  # fmt: skip


class _Forward(functools.partial):
    """The forward of a module for some rows, bound to the module and to the rows."""

    def __reduce__(self) -> Any:
        # A copy would take and give rows for ever.
        raise TypeError("a model inside ImageRows.applied cannot be copied or pickled; do that outside the block.")


def replacement(name: str, module: nn.Module, rows: ImageRows) -> Callable[..., Any] | None:
    """The forward of a module for these rows; None for its own.

    Raises:
        NotImplementedError: It is not known whether the module treats each pixel by itself; or its forward has been
            replaced before.
    """
    own = f"{type(module).__module__}.{type(module).__qualname__}"
    function = _FORWARDS.get(type(module)) or _DIFFUSERS.get(own)
    if function is not None:
        if "forward" in vars(module):
            raise NotImplementedError(
                f"{name or 'the model'}, a {own}, has a forward that replaces its class's, as inside another "
                "ImageRows.applied or with a hook of accelerate; leave that block, or remove the hook, before."
            )
        return _Forward(function, module, rows)
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
    proxy = lambda x: module.proxy(x).to(x.dtype)  # noqa: E731  (computed while x is sent)
    return rows.propagate(
        x, proxy, module.tap_proj, lam_proj, module.u_proj, module.skip_proj, module.merge,
        directions=module.directions, segment=module.segment, impl=module.impl,
    )  # fmt: skip


def _convolve(module: nn.Conv2d, rows: ImageRows, x: Tensor) -> Tensor:
    from .rows import Map

    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise NotImplementedError(f"{module}: only numbers of rows and columns of zeros can be padded with.")
    (stride, _), (padding, padding_w) = module.stride, module.padding
    reach, reach_w = (d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    if (reach, stride, padding) == (1, 1, 0):
        return nn.Conv2d.forward(module, x)
    of = rows.map_of(x)
    height, width = of.starts[-1], (of.width + 2 * padding_w - reach_w) // module.stride[1] + 1
    out_height = (height + 2 * padding - reach) // stride + 1
    starts = (*(min(math.ceil(start / stride), out_height) for start in of.starts[:-1]), out_height)
    rows.add(Map(starts, width))
    needed = [
        (first * stride - padding, (after - 1) * stride - padding + reach)
        for first, after in itertools.pairwise(starts)
    ]
    finish = rows.start_around(x, of, [(max(low, 0), min(high, height)) for low, high in needed])

    def convolve(x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(
            x, module.weight, module.bias, module.stride, (padding, padding_w), module.dilation, module.groups
        )

    (here, end), (low, high), (first, after) = rows.interval(of), needed[rows.rank], starts[rows.rank :][:2]
    # How many rows of the result need rows above or below those of this process, and where these rows begin or end.
    top = max(math.ceil((here + padding) / stride) - first, 0) if here > 0 else 0
    bottom = max(after - 1 - (end + padding - reach) // stride, 0) if end < height else 0
    top_end, bottom_start = (first + top - 1) * stride - padding + reach, (after - bottom) * stride - padding
    aligned = here % stride == 0 and (end - here + 2 * padding - reach) // stride + 1 == after - first
    if not aligned or (top and top_end > end) or (bottom and bottom_start < here):
        above, below = finish()
        x = torch.cat([*above, x[:, :, max(low - here, 0) : max(high - here, 0)], *below], dim=2)
        return convolve(F.pad(x, (0, 0, max(-low, 0), max(high - height, 0))))
    # The rows in the middle while those around are on their way, without a copy of the whole map.
    y = convolve(x, padding)
    above, below = finish()
    if not top and not bottom and above + below:
        # Nothing was received, but what was sent has gradients: the result depends on the exchange on every process.
        y[:, :, :0] = torch.cat(above + below, dim=2)[:, :, :0].reshape(*y.shape[:2], 0, y.shape[3])
    if top:
        x_top = torch.cat([*above, x[:, :, : top_end - here]], dim=2)
        y[:, :, :top] = convolve(F.pad(x_top, (0, 0, max(-low, 0), 0)))
    if bottom:
        x_bottom = torch.cat([x[:, :, bottom_start - here :], *below], dim=2)
        y[:, :, y.shape[2] - bottom :] = convolve(F.pad(x_bottom, (0, 0, 0, max(high - height, 0))))
    return y


def _group_norm(module: nn.GroupNorm, rows: ImageRows, x: Tensor) -> Tensor:
    of = rows.map_of(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.unflatten(1, (module.num_groups, -1))  # [B, G, C / G, rows, W]
    statistics = gathered(torch.stack(torch.var_mean(grouped, (2, 3, 4), correction=0)), rows.group)
    heights = [of.rows(rank) for rank in range(rows.count)]
    share = torch.tensor(heights, dtype=wide.dtype, device=x.device).view(-1, 1, 1) / of.starts[-1]
    variances, means = statistics.unbind(1)  # [R, B, G]
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    scale = (variance + module.eps).rsqrt()  # [B, G]
    channels = x.shape[1] // module.num_groups
    scale, mean = (one.repeat_interleave(channels, 1)[..., None, None] for one in (scale, mean))  # [B, C, 1, 1]
    if not module.affine:
        return ((wide - mean) * scale).to(x.dtype)
    weight, bias = (one.to(wide.dtype).view(1, -1, 1, 1) for one in (module.weight, module.bias))
    scale = scale * weight
    return torch.addcmul(bias - mean * scale, wide, scale).to(x.dtype)


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


def _attend(
    module: Any, rows: ImageRows, x: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    # Self-attention becomes cross-attention to the tokens of all processes: these are sent once, and keys and values
    # would be twice as much.
    if encoder_hidden_states is None:
        if module.group_norm is not None or module.spatial_norm is not None or module.fused_projections:
            raise NotImplementedError(
                f"{module}: self-attention with norms of its own or fused projections is not computed on some rows; "
                "unfuse them, or mount a GSPNAdapter in its place."
            )
        of = rows.map_of_tokens(x)
        whole = rows.gather(x.unflatten(1, (-1, of.width)).permute(0, 3, 1, 2))  # [B, C, H, W]
        encoder_hidden_states = whole.flatten(2).transpose(1, 2)
    return type(module).forward(module, x, encoder_hidden_states, *args, **kwargs)


def _downsample(module: Any, rows: ImageRows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG001
    if module.padding == 0:
        raise NotImplementedError(
            f"{module}: the rows that it pads with at the bottom alone are not known; use padding=1, as UNets have."
        )
    return type(module).forward(module, x, *args, **kwargs)


def _upsample(
    module: Any, rows: ImageRows, x: Tensor, output_size: Any = None, *args: Any, **kwargs: Any  # noqa: ARG001
) -> Tensor:  # fmt: skip
    if module.norm is not None or not module.interpolate:
        raise NotImplementedError(f"{module}: only the nearest pixels and a convolution are computed on some rows.")
    source = rows.map_of(x)
    size = [2 * side for side in x.shape[2:]] if output_size is None else [int(side) for side in output_size]
    target = rows.known(*size)
    if target is None or target.starts[-1] not in (2 * source.starts[-1] - 1, 2 * source.starts[-1]):
        raise NotImplementedError(
            f"rank {rows.rank} of {rows.count}: {module} makes {size} of {tuple(x.shape[2:])}, and no map of the image "
            "that was halved before has these rows; give it an image whose sides the model's strides divide."
        )
    # Row i is row i // 2 of the smaller map, which may be another process's where rows are uneven.
    x = rows.between(x, source, [(low // 2, (high + 1) // 2) for low, high in itertools.pairwise(target.starts)])
    odd = rows.interval(target)[0] % 2
    x = F.interpolate(x, size=(2 * x.shape[2], size[1]), mode="nearest")[:, :, odd : odd + size[0]]
    if not module.use_conv:
        return x
    return (module.conv if module.name == "conv" else module.Conv2d_0)(x)


_FORWARDS: dict[type, Callable[..., Tensor]] = {
    GSPN2d: _propagate, nn.Conv2d: _convolve, nn.GroupNorm: _group_norm, ResponseNorm: _respond,
    nn.AdaptiveAvgPool2d: _pool, DropPath: _drop_path,
}  # fmt: skip
# By name, so that diffusers is not imported.
_DIFFUSERS: dict[str, Callable[..., Tensor]] = {
    "diffusers.models.attention_processor.Attention": _attend,
    "diffusers.models.downsampling.Downsample2D": _downsample,
    "diffusers.models.upsampling.Upsample2D": _upsample,
}
