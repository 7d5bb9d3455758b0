"""GSPN backbones for timm: GSPN (arXiv 2501.12381), GSPN-2 (arXiv 2512.07884), and two models for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import ClassifierHead
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..nn import GSPNBlock
from ..ops.valid_size import Sizes, as_valid_size, reduced, valid_mask, within
from .official_checkpoint import checkpoint_filter_fn

Lines = int | None | Sequence["int | None"]
"""A number of lines for all blocks of a stage, or one for each of them."""

# The options of GSPN2d besides the width and the segment, which models pass on as ``scan``.
_SCAN_OPTIONS = ("proxy_dim", "groups", "skip", "directions", "reference_lines", "alignment", "impl")


class Stem(nn.Module):
    """Two 3x3 convolutions that reduce the image to the first stage's resolution, by a stride of 2 or 4."""

    def __init__(self, in_chans: int, dim: int, *, stride: int, **dd: Any) -> None:
        super().__init__()
        if stride not in (2, 4):
            raise ValueError(f"{stride=}: the stem reduces the image by 2 or by 4.")
        self.stride = stride
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = LayerNorm2d(dim // 2, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=stride // 2, padding=1, **dd)
        self.norm2 = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor, valid_size: Tensor | None = None) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, dim, ceil(H / stride), ceil(W / stride)]``; ``valid_size`` as for the model.

        The sizes of the results are ``ceil(valid_size / stride)``.
        """
        x = self.act(self.norm1(self.conv1(within(x, valid_size))))  # [B, dim / 2, H / 2, W / 2]
        return self.norm2(self.conv2(within(x, reduced(valid_size, 2))))


class Stage(nn.Module):
    """Blocks at one resolution, after a 3x3 convolution with stride 2 and a LayerNorm if the width changes.

    Args:
        in_dim: channels in.
        dim: channels of the blocks.
        segments: lines after which the scans restart, one entry for each block.
        reference_lines: the number of lines that lam is normalized to, one entry for each block.
        drop_path: stochastic depth rates, one for each block.
        dd: device and dtype of the parameters.
        **block: options of :class:`gspn.nn.GSPNBlock`.
    """

    def __init__(
        self, in_dim: int, dim: int, *, segments: Sequence[int | None], reference_lines: Sequence[int | None],
        drop_path: Sequence[float], dd: Mapping[str, Any], **block: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        self.stride = 1 if in_dim == dim else 2
        if in_dim != dim:
            conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=LayerNorm2d(dim, eps=1e-5, **dd)))
        self.blocks = nn.Sequential(
            *(
                GSPNBlock(dim, segment=s, reference_lines=r, drop_path=p, **block, **dd)
                for s, r, p in zip(segments, reference_lines, drop_path, strict=True)
            )
        )

    def forward(self, x: Tensor, valid_size: Tensor | None = None) -> Tensor:
        """``[B, in_dim, H, W]`` to ``[B, dim, H', W']``; ``valid_size`` are the sizes of the images in ``x``.

        The sizes of the results are ``ceil(valid_size / stride)``.
        """
        x = self.downsample(within(x, valid_size))
        valid_size = reduced(valid_size, self.stride)
        if self.grad_checkpointing:
            return checkpoint_seq([partial(block, valid_size=valid_size) for block in self.blocks], x)
        for block in self.blocks:
            x = block(x, valid_size)
        return x


class GSPN(nn.Module):
    """A backbone of GSPN blocks in stages of growing width and falling resolution.

    The model takes images of any size: there is no positional embedding, and nothing is interpolated.

    Args:
        num_classes: number of classes; with 0 the model returns the pooled features.
        global_pool: pooling of the head, ``"avg"``, ``"max"``, ... or ``""`` for none.
        dims: width of each stage.
        depths: number of blocks of each stage.
        stem_stride: 4, or 2 for small images.
        segment: lines after which the scans restart, None for global scans. One value for all blocks, or one entry for
            each stage, which is one value for its blocks or a sequence with one value for each.
        scan: options of :class:`gspn.nn.GSPN2d`: ``proxy_dim``, ``groups``, ``skip``, ``directions``, ``alignment``,
            ``impl``; and ``reference_lines``, with entries as for ``segment``, because the stages' maps differ in size.
        lpu: whether the blocks have local perception units.
        layer_scale: initial value of the blocks' layer scale; None for no layer scale.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; rates grow linearly from 0.

    Example:
        >>> import torch
        >>> from gspn.models import GSPN
        >>> model = GSPN(dims=(16, 32), depths=(1, 1), num_classes=10)
        >>> model(torch.randn(1, 3, 37, 50)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", *,
        dims: Sequence[int] = (96, 192, 384, 768), depths: Sequence[int] = (2, 2, 7, 2), stem_stride: int = 4,
        segment: Lines | Sequence[Lines] = None, scan: Mapping[str, Any] | None = None, lpu: bool = False,
        layer_scale: float | None = None, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(dims) != len(depths) or not dims:
            raise ValueError(f"{dims=} and {depths=}: pass one width and one depth for each stage.")
        unknown = sorted(set(scan or {}) - set(_SCAN_OPTIONS))
        if unknown:
            raise ValueError(f"scan has unknown options {unknown}; it takes {list(_SCAN_OPTIONS)}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NCHW"

        self.stem = Stem(in_chans, dims[0], stride=stem_stride, **dd)
        options = {"lpu": lpu, "layer_scale": layer_scale, **(scan or {})}
        segments = lines_of_blocks("segment", segment, depths)
        references = lines_of_blocks("reference_lines", options.pop("reference_lines", None), depths)
        rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        self.feature_info = []
        before, reduction = dims[0], stem_stride
        for i, dim in enumerate(dims):
            if i > 0 and dim == before:
                raise ValueError(f"{dims=}: stages {i - 1} and {i} have the same width; pass a different one for each.")
            stage = Stage(
                before, dim, segments=segments[i], reference_lines=references[i], drop_path=rates[i], dd=dd, **options
            )
            stages.append(stage)
            reduction *= 2 if i > 0 else 1
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
            before = dim
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = before
        self.norm = LayerNorm2d(before, eps=1e-5, **dd)
        self.head = ClassifierHead(before, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize projections, MLPs and classifier from a normal of 0.02, as usual, and nothing else."""
        if self.stem.conv1.weight.is_meta:
            return  # there are no values, and PyTorch takes seconds to compute none
        for module in self.modules():
            pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
            if isinstance(module, nn.Linear) or pointwise:
                trunc_normal_(module.weight, std=0.02)  # type: ignore[arg-type]
                if module.bias is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.modules():
            # GSPN2d keeps its own: small maps would leave next to nothing of the scans.
            if hasattr(module, "tap_proj"):
                module.reset_parameters()  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides those with one axis."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign each parameter to a layer, for layer-wise learning rates."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages.children():
            cast("Stage", stage).grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes leave none, and ``global_pool=None`` keeps the present pooling."""
        self.num_classes = num_classes
        self.head.in_features = self.num_features  # changed if stages were pruned
        self.head.reset(num_classes, pool_type=global_pool)
        weight = self.stem.conv1.weight  # the head itself may have no parameters
        self.head.to(device=weight.device, dtype=weight.dtype)

    def init_non_persistent_buffers(self) -> None:
        """Do nothing: there are no buffers."""

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False, valid_size: Sizes | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Compute the features and the intermediate features of selected stages.

        Args:
            x: ``[B, in_chans, H, W]``.
            indices: the stages, or a number n for the last n, or None for all.
            norm: whether to normalize the last stage's features.
            stop_early: whether to skip the stages after the last selected one.
            output_fmt: ``"NCHW"``.
            intermediates_only: whether to return the list only.
            valid_size: as for :meth:`forward`. The images' parts of each map are ``ceil(valid_size / reduction)``, by
                the ``reduction`` in ``feature_info``; what is beyond has no meaning.

        Returns:
            The features as :meth:`forward_features` returns them, and a list of ``[B, C_i, H_i, W_i]``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"{output_fmt=}: these features are maps; use 'NCHW'.")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        end = len(self.stages) - 1
        run = last if stop_early else end
        valid_size = as_valid_size(valid_size, x)
        x, valid_size = self.stem(x, valid_size), reduced(valid_size, self.stem.stride)
        for i, stage in enumerate(cast("Sequence[Stage]", self.stages[: run + 1])):
            x, valid_size = stage(x, valid_size), reduced(valid_size, stage.stride)
            if i in take:
                intermediates.append(self.norm(x) if norm and i == end else x)
        if intermediates_only:
            return intermediates
        if run == end:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that the stages of :meth:`forward_intermediates` do not need, and return those stages."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()  # the norm has the width of the last stage
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor, valid_size: Sizes | None = None) -> Tensor:
        """``[B, in_chans, H, W]`` to the normalized map ``[B, num_features, H', W']``; ``valid_size`` as for forward.

        The images' parts of the map are ``ceil(valid_size / reduction)``; what is beyond has no meaning.
        """
        valid_size = as_valid_size(valid_size, x)
        x, valid_size = self.stem(x, valid_size), reduced(valid_size, self.stem.stride)
        for stage in cast("Sequence[Stage]", self.stages):
            x, valid_size = stage(x, valid_size), reduced(valid_size, stage.stride)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False, valid_size: Sizes | None = None) -> Tensor:
        """``[B, num_features, H', W']`` to logits ``[B, num_classes]``, or to the classifier's input.

        ``valid_size [B, 2]`` are the sizes of the images' parts of this map.
        """
        valid_size = as_valid_size(valid_size, x)
        x = _pooled(x, valid_size, getattr(getattr(self.head, "global_pool", None), "pool_type", ""))
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor, valid_size: Sizes | None = None) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, num_classes]``.

        Args:
            x: images; those of several sizes are padded to one, each at the top left. What is in the padding has no
                influence.
            valid_size: the height and width of each image: int64 ``[B, 2]`` on any device, or a list of pairs. The
                result of each image is the one it has alone, to rounding. None for images that fill ``x``.

        Raises:
            NotImplementedError: there are sizes, and a pooling other than ``"avg"`` and ``"max"``, or scans that depend
                on the size of the map; see :class:`gspn.nn.GSPN2d`.
        """
        valid_size = as_valid_size(valid_size, x)
        x = self.forward_features(x, valid_size)
        for module in (self.stem, *cast("Sequence[Stage]", self.stages)):
            valid_size = reduced(valid_size, module.stride)
        return self.forward_head(x, valid_size=valid_size)


def _pooled(x: Tensor, valid_size: Tensor | None, pool: str) -> Tensor:
    """``[B, C, 1, 1]``, the pooled pixels of each image, which pooled again are the same; ``x`` without sizes."""
    if valid_size is None:
        return x
    kind, pixels = pool.removeprefix("fast"), valid_size.prod(1).view(-1, 1, 1, 1)
    if kind == "avg":
        return within(x, valid_size).sum((2, 3), keepdim=True) / pixels.clamp(min=1)
    if kind == "max":
        largest = torch.where(valid_mask(valid_size, x), x, -torch.inf).amax((2, 3), keepdim=True)
        return torch.where(pixels > 0, largest, 0)
    raise NotImplementedError(f"global_pool={pool!r} has no valid_size; use 'avg' or 'max'.")


# A trace of torch.fx does not know whether there are sizes: it keeps the calls as they are.
for _name in ("as_valid_size", "reduced", "within", "_pooled"):
    torch.fx.wrap(_name)


def lines_of_blocks(name: str, lines: Lines | Sequence[Lines], depths: Sequence[int]) -> list[list[int | None]]:
    """Expand one number of lines for all, for each stage or for each block to one for each block of each stage."""
    stages = [lines] * len(depths) if lines is None or isinstance(lines, int) else list(lines)
    if len(stages) != len(depths):
        raise ValueError(
            f"{name}={lines!r} has {len(stages)} entries for {len(depths)} stages; pass one for each, or one for all."
        )
    result = []
    for i, (stage, depth) in enumerate(zip(stages, depths, strict=True)):
        blocks = [stage] * depth if stage is None or isinstance(stage, int) else list(stage)
        if len(blocks) != depth:
            raise ValueError(
                f"{name}={lines!r} has {len(blocks)} entries for {depth} blocks in stage {i}; pass one each."
            )
        result.append(blocks)
    return result


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2501.12381",
        "paper_name": "Parallel Sequence Modeling via Generalized Spatial Propagation Network",
        **kwargs,
    }


_GSPN2 = dict(paper_ids="arXiv:2512.07884", paper_name="GSPN-2: Efficient Parallel Sequence Modeling")


def _packaged(name: str, classes: Sequence[str], **kwargs: Any) -> dict[str, Any]:
    """The configuration of weights that ship with the package; the card beside them says how they were trained."""
    file = Path(__file__).parent / "weights" / f"{name}.safetensors"
    return _cfg(file=str(file), num_classes=len(classes), label_names=tuple(classes), crop_pct=1.0, **kwargs)


EMOJI_CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)  # fmt: skip

default_cfgs = generate_default_cfgs(
    {
        "gspn_pico.mnist5k": _packaged("gspn_pico.mnist5k", "0123456789", input_size=(3, 28, 28), pool_size=(4, 4)),
        "gspn_nano.emoji": _packaged("gspn_nano.emoji", EMOJI_CATEGORIES, input_size=(3, 48, 48), pool_size=(3, 3)),
        "gspn_pico.untrained": _cfg(input_size=(3, 28, 28), pool_size=(4, 4), crop_pct=1.0, num_classes=10),
        "gspn_nano.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0, num_classes=9),
        "gspn_tiny.untrained": _cfg(),
        "gspn_small.untrained": _cfg(),
        "gspn_base.untrained": _cfg(),
        "gspn2_tiny.untrained": _cfg(**_GSPN2),
        "gspn2_small.untrained": _cfg(**_GSPN2),
        "gspn2_base.untrained": _cfg(**_GSPN2),
    }
)


# In the third stage of the authors' GSPN-B the first seven blocks and every seventh are global; the others have
# segments of two lines.
def _mostly_global(depth: int) -> tuple[int | None, ...]:
    return tuple(None if j < 7 or (j + 1) % 7 == 0 else 2 for j in range(depth))


def _create_gspn(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> GSPN:
    # Users of timm pass the options of the scan one by one.
    flat = {name: kwargs.pop(name) for name in _SCAN_OPTIONS if name in kwargs}
    scan = {**defaults.pop("scan", {}), **(kwargs.pop("scan", None) or {}), **flat}
    args = {**defaults, **kwargs, "scan": scan}
    return build_model_with_cfg(
        GSPN,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(len(args["depths"]))), flatten_sequential=True),
        pretrained_filter_fn=checkpoint_filter_fn,
        **args,
    )


@register_model
def gspn_pico(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-Pico, for images of 28 to 96 pixels: three stages from half the image's resolution, with global scans.

    All channels share the taps, which takes half the time of taps for each channel.
    """
    defaults = dict(dims=(32, 64, 128), depths=(1, 1, 4), stem_stride=2, scan=dict(groups=1))
    return _create_gspn("gspn_pico", pretrained, defaults, kwargs)


@register_model
def gspn_nano(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-Nano, for images of 28 to 96 pixels: four stages from half the image's resolution, as :func:`gspn_pico`."""
    defaults = dict(dims=(32, 64, 128, 256), depths=(1, 1, 4, 3), stem_stride=2, scan=dict(groups=1))
    return _create_gspn("gspn_nano", pretrained, defaults, kwargs)


@register_model
def gspn_tiny(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-T (arXiv 2501.12381), as in the authors' configuration: stages 3 and 4 global, the others segments of 2."""
    defaults = dict(dims=(96, 192, 384, 768), depths=(2, 2, 7, 2), segment=(2, 2, None, None))
    return _create_gspn("gspn_tiny", pretrained, defaults, kwargs)


@register_model
def gspn_small(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-S (arXiv 2501.12381), as in the authors' configuration: stage 4 global, the others segments of 2."""
    defaults = dict(dims=(108, 216, 432, 864), depths=(5, 5, 10, 2), segment=(2, 2, 2, None), scan=dict(proxy_dim=16))
    return _create_gspn("gspn_small", pretrained, defaults, kwargs)


@register_model
def gspn_base(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-B (arXiv 2501.12381), as in the authors' configuration: stage 3 mostly and stage 4 wholly global."""
    defaults = dict(dims=(120, 240, 480, 960), depths=(4, 4, 15, 4), segment=(2, 2, _mostly_global(15), None))
    return _create_gspn("gspn_base", pretrained, defaults, kwargs)


# GSPN-2 shares the taps between the channels and has a proxy of two channels and local perception units. Its widths and
# depths are not published: these match its published numbers of parameters and operations.
_GSPN2_SCAN = dict(proxy_dim=2, groups=1)


@register_model
def gspn2_tiny(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-2-T (arXiv 2512.07884): taps shared by all channels, a proxy of 2, local perception units, global scans."""
    defaults = dict(dims=(64, 128, 256, 512), depths=(2, 4, 16, 3), scan=_GSPN2_SCAN, lpu=True)
    return _create_gspn("gspn2_tiny", pretrained, defaults, kwargs)


@register_model
def gspn2_small(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-2-S (arXiv 2512.07884): see :func:`gspn2_tiny`."""
    defaults = dict(dims=(96, 192, 384, 768), depths=(2, 4, 18, 2), scan=_GSPN2_SCAN, lpu=True)
    return _create_gspn("gspn2_small", pretrained, defaults, kwargs)


@register_model
def gspn2_base(pretrained: bool = False, **kwargs: Any) -> GSPN:
    """GSPN-2-B (arXiv 2512.07884): see :func:`gspn2_tiny`."""
    defaults = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 15, 3), scan=_GSPN2_SCAN, lpu=True)
    return _create_gspn("gspn2_base", pretrained, defaults, kwargs)
