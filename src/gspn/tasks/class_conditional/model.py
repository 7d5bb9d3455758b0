"""Denoisers: built from a configuration, and loaded as pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._errors import UsageError, require
from ..diffusion import pretrained
from ..diffusion.pretrained import locate, shipped
from .config import ClassConditionalConfig

PIPELINES = ("ClassConditionalPipeline", "DiTPipeline")
"""The pipelines that are supported, the second one's from diffusers."""

_DIT = {
    "T": {"num_layers": 4, "num_attention_heads": 3, "attention_head_dim": 32},
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
"""DiT's published sizes (arXiv 2212.09748, table 1), and one for small images."""


def build_denoiser(config: ClassConditionalConfig, *, num_classes: int, channels: int, sample_size: int) -> nn.Module:
    """The denoiser of a configuration, on the CPU. Label ``num_classes`` is "no class".

    Raises:
        UsageError: There is no model of that size, or it does not take these arguments.
    """
    require("diffusers", "timm", extra="diffusers")
    model = config.model
    shared: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels * (2 if config.diffusion.learned_sigma else 1),
    }
    try:
        if model.name == "dit":
            denoiser = _build_dit(config, num_classes, shared)
        else:
            from gspn.models import GSPNDenoiser2DModel

            denoiser = GSPNDenoiser2DModel.from_size(
                model.size, num_class_embeds=num_classes, class_dropout_prob=model.class_dropout, mixer=model.name,
                **shared, **model.options,
            )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UsageError(f"model {model.name} {model.size!r} with {model.options}: {error}") from None
    patch = denoiser.config["patch_size"]
    data = config.data
    for side in (sample_size, *(size * sample_size // data.size for size in data.sizes or ())):
        if side % patch:
            raise UsageError(
                f"model.size {model.size!r} has patches of {patch}, which do not divide the side {side}; choose "
                f"another patch or {'data.size' if side == sample_size else 'data.sizes'}."
            )
    if model.grad_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser


def initialize_from(denoiser: nn.Module, source: str) -> None:
    """Give a denoiser the weights of a pipeline's.

    Raises:
        UsageError: There is no such pipeline, or its weights are those of another model.
    """
    try:
        denoiser.load_state_dict(load_pipeline(source).transformer.state_dict())
    except RuntimeError as error:
        raise UsageError(f"model.init_from {source!r} has weights of another model: {error}") from None


def _build_dit(config: ClassConditionalConfig, num_classes: int, shared: dict[str, Any]) -> Any:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    name, _, patch = config.model.size.partition("/")
    if name not in _DIT or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"use one of {', '.join(_DIT)}, a slash and the side of a patch, as in 'B/2'.")
    options = {**_DIT[name], "patch_size": int(patch), **shared, **config.model.options}
    model = DiTTransformer2DModel(num_embeds_ada_norm=num_classes, norm_type="ada_norm_zero", **options)
    blocks: Any = model.transformer_blocks
    for block in blocks:
        # diffusers fixes it at 0.1, in every block's own embedding.
        block.norm1.emb.class_embedder.dropout_prob = config.model.class_dropout
    _initialize_dit(model)
    return model


def _initialize_dit(model: nn.Module) -> None:
    """Initialise as DiT's authors do; diffusers leaves it out, as it loads trained weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches: Any = model.pos_embed
    nn.init.xavier_uniform_(patches.proj.weight.flatten(1))
    nn.init.zeros_(patches.proj.bias)
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        embedding = block.norm1.emb
        nn.init.normal_(embedding.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for linear in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]


def shipped_pipelines() -> dict[str, Path]:
    """The names of the class-conditional pipelines that come with the package, and their directories.

    Example:
        >>> from gspn.tasks.class_conditional import shipped_pipelines
        >>> sorted(shipped_pipelines())
        ['gspn_denoiser.mnist5k', 'gspn_denoiser_sizes.mnist5k']
    """
    return shipped("model_index.json", PIPELINES)


def load_pipeline(source: str | Path) -> Any:
    """Load a pipeline from a run's directory, one that ``save_pretrained`` wrote, a shipped name, or a hub id.

    Returns:
        A :class:`gspn.diffusers.ClassConditionalPipeline` in float32, in evaluation mode on the CPU.

    Raises:
        UsageError: There is none, or it cannot be loaded.

    Example:
        >>> from gspn.tasks.class_conditional import load_pipeline
        >>> load_pipeline("gspn_denoiser.mnist5k").num_classes
        10
    """
    require("diffusers", extra="diffusers")
    from gspn.diffusers import ClassConditionalPipeline

    location = locate(
        source, "model_index.json", shipped_pipelines(), "class-conditional pipeline", "gspn class-conditional train"
    )
    # In float32 whatever the file has; lower precision is by autocast.
    return pretrained.load_pipeline(ClassConditionalPipeline, location, classes=PIPELINES, dtype=torch.float32)
