"""Models of diffusers with random weights: the structure of the real ones, a twentieth of their width."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor

TEXT = 24

# From the configurations of the published checkpoints, but for the widths and SDXL's lowest level, of 10 blocks there.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": (16, 32, 64, 64),
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sd21": {
        "block_out_channels": (16, 32, 64, 64),
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
    "tiny": {
        "block_out_channels": (16, 32),
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}


def make_unet(name: str = "tiny", **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shared = {"sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": TEXT}
    return UNet2DConditionModel(**shared | UNETS[name] | options).eval()


def make_pixart(**options: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    options = {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 16,
        "cross_attention_dim": 16, "caption_channels": TEXT, "use_additional_conditions": False,
    } | options  # fmt: skip
    return PixArtTransformer2DModel(**options).eval()


def make_dit(**options: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    options = {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "in_channels": 4,
        "num_embeds_ada_norm": 10,
    } | options  # fmt: skip
    return DiTTransformer2DModel(**options).eval()


def inputs(model: Any, height: int = 12, width: int = 20, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """The arguments of ``model``: noise, timesteps, text, and SDXL's further conditions."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    given: dict[str, Any] = {"timestep": torch.arange(batch) * 100 + 7}
    if isinstance(model, DiTTransformer2DModel):
        return given | {"hidden_states": random(batch, 4, height, width), "class_labels": torch.arange(batch) % 10}
    given |= {"encoder_hidden_states": random(batch, 5, TEXT)}
    if isinstance(model, PixArtTransformer2DModel):
        return given | {"hidden_states": random(batch, 4, height, width)}
    if model.config.addition_embed_type == "text_time":
        given["added_cond_kwargs"] = {"text_embeds": random(batch, 16), "time_ids": torch.ones(batch, 6)}
    return given | {"sample": random(batch, 4, height, width)}


def run(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model, **options)).sample
