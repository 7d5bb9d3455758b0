"""What a text-to-image UNet is told of its text: encoded by the pipeline's own encoders, given as the UNet takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UsageError

_TEXT_TIME = "text_time"


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        states: ``[B, L, D]``, for cross-attention.
        pooled: ``[B, P]`` where the UNet has further conditions (Stable Diffusion XL), else None.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Conditioning:
        """Some of the prompts: a slice, a list or a tensor of indices."""
        return Conditioning(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As :meth:`torch.Tensor.to`."""
        pooled = None if self.pooled is None else self.pooled.to(*args, **kwargs)
        return Conditioning(self.states.to(*args, **kwargs), pooled)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Those of several, one after another."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], *, batch_size: int = 64) -> Conditioning:
    """Prompts through the text encoders of a pipeline, on their device and in their dtype.

    Args:
        pipeline: a ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``, with its text encoders.
        prompts: at least one.
        batch_size: prompts at a time.

    Raises:
        UsageError: there is no prompt, or the pipeline has no text encoder.
    """
    if not prompts:
        raise UsageError("there is no prompt; give one at least.")
    if pipeline.text_encoder is None and getattr(pipeline, "text_encoder_2", None) is None:
        raise UsageError(
            f"this {type(pipeline).__name__} has no text encoder; load it with gspn.tasks.text_to_image.load_pipeline, "
            "or pass text_encoder and tokenizer to from_pretrained."
        )
    parts = []
    for begin in range(0, len(prompts), batch_size):
        some = list(prompts[begin : begin + batch_size])
        shared: dict[str, Any] = {
            "device": _device_of_text(pipeline),
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        if has_further_conditions(pipeline.unet):
            states, _, pooled, _ = pipeline.encode_prompt(some, **shared)
            parts.append(Conditioning(states, pooled))
        else:
            parts.append(Conditioning(pipeline.encode_prompt(some, **shared)[0]))
    return Conditioning.cat(parts)


@contextmanager
def encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """The text encoders of a pipeline on a device, and nothing else of it; afterwards they are on the CPU."""
    encoders = [one for one in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if one is not None]
    for encoder in encoders:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")


def _device_of_text(pipeline: Any) -> torch.device:
    """Where the text encoders are, or, where hooks bring them, where they will be."""
    encoder = pipeline.text_encoder if pipeline.text_encoder is not None else pipeline.text_encoder_2
    return pipeline._execution_device if hasattr(encoder, "_hf_hook") else encoder.device


def encode_nothing(pipeline: Any) -> Conditioning:
    """The conditioning of guidance without a negative prompt, of one image.

    The empty prompt's; zeros where the pipeline was trained so (``force_zeros_for_empty_prompt``).
    """
    empty = encode_prompts(pipeline, [""])
    if pipeline.config.get("force_zeros_for_empty_prompt", False):
        pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
        return Conditioning(torch.zeros_like(empty.states), pooled)
    return empty


def has_further_conditions(unet: Any) -> bool:
    """Whether a UNet takes pooled text and sizes besides the text's states, as Stable Diffusion XL's does."""
    return unet.config.addition_embed_type == _TEXT_TIME


def unet_arguments(unet: Any, text: Conditioning, height: int, width: int) -> dict[str, Any]:
    """The keyword arguments of a UNet for some prompts, besides the latents and the time.

    Args:
        unet: a ``UNet2DConditionModel``.
        text: ``[B, ...]``.
        height: of the image in pixels, which Stable Diffusion XL is told as its original and its target size.
        width: likewise.

    Raises:
        UsageError: the UNet wants conditions that a prompt and a size do not give.
    """
    config = unet.config
    unmet = [
        key
        for key in ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
        if config.get(key) is not None
    ]
    if unmet or config.addition_embed_type not in (None, _TEXT_TIME):
        found = unmet[0] if unmet else "addition_embed_type"
        raise UsageError(
            f"this UNet has {found}={config.get(found)!r}, and gspn knows the conditions of Stable Diffusion 1.5, 2.1 "
            "and XL; use the pipeline of diffusers itself, with the adapter mounted on its UNet."
        )
    found_text: dict[str, Any] = {"encoder_hidden_states": text.states}
    if config.addition_embed_type == _TEXT_TIME:
        if text.pooled is None:
            raise UsageError(
                "this UNet takes pooled text, and the conditioning has none; encode the prompts with its pipeline."
            )
        sizes = torch.tensor([height, width, 0, 0, height, width]).to(text.pooled)
        found_text["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": sizes.expand(len(text), -1)}
    return found_text
