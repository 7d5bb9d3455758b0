"""Whole text-to-image pipelines with random weights, small enough to draw with in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_support import TEXT, make_unet
from gspn.diffusers import GSPNAdapter

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
POOLED = 16


def make_tokenizer(directory: Path) -> CLIPTokenizer:
    """Of letters, from files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(directory), model_max_length=8)


def make_text_encoder(kind: Any = CLIPTextModel, width: int = TEXT) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        projection_dim=POOLED,
    )  # fmt: skip
    return kind(config).eval()


def make_vae(factor: int = 8) -> AutoencoderKL:
    """One whose images have some contrast."""
    torch.manual_seed(2)
    levels = {4: 3, 8: 4}[factor]
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.1)
    return vae.eval()


def make_scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's chain."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip


def make_sd(directory: Path, *, factor: int = 8, prediction: str = "epsilon", **unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion, trained at 8 latent pixels."""
    pipeline = StableDiffusionPipeline(
        vae=make_vae(factor), text_encoder=make_text_encoder(), tokenizer=make_tokenizer(directory / "words"),
        unet=make_unet("tiny", sample_size=8, **unet), scheduler=make_scheduler(prediction), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sdxl(directory: Path, *, factor: int = 4) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL, trained at 8 latent pixels."""
    tokenizer = make_tokenizer(directory / "words")
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(factor), text_encoder=make_text_encoder(width=8),
        text_encoder_2=make_text_encoder(CLIPTextModelWithProjection, TEXT - 8), tokenizer=tokenizer,
        tokenizer_2=tokenizer, scheduler=make_scheduler(), add_watermarker=False,
        unet=make_unet("sdxl", sample_size=8, transformer_layers_per_block=1, layers_per_block=1),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_adapter(pipeline: Any, **options: Any) -> GSPNAdapter:
    torch.manual_seed(3)
    return GSPNAdapter.from_model(pipeline.unet, **options).eval()
