"""The conditioning of a text-to-image UNet: prompts encoded by the pipeline's own text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._errors import UsageError

_TEXT_TIME = "text_time"


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts."""

    states: Tensor
    """``[B, L, D]``, the encoders' hidden states for cross-attention."""
    pooled: Tensor | None = None
    """``[B, P]`` for Stable Diffusion XL, else None."""

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Conditioning:
        """The prompts that a slice, a list or a tensor of indices selects."""
        return Conditioning(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Move or convert all tensors, as :meth:`torch.Tensor.to`."""
        pooled = None if self.pooled is None else self.pooled.to(*args, **kwargs)
        return Conditioning(self.states.to(*args, **kwargs), pooled)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate several."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], *, batch_size: int = 64) -> Conditioning:
    """Encode prompts, at least one, with a pipeline's text encoders, on their device and in their dtype.

    Raises:
        UsageError: There is no prompt, or the pipeline has no text encoder.
    """
    if not prompts:
        raise UsageError("there is no prompt; give at least one.")
    if pipeline.text_encoder is None and getattr(pipeline, "text_encoder_2", None) is None:
        raise UsageError(
            f"this {type(pipeline).__name__} has no text encoder; load it with load_pipeline of "
            "gspn.tasks.text_to_image.pipelines, or pass text_encoder and tokenizer to from_pretrained."
        )
    encoder = pipeline.text_encoder if pipeline.text_encoder is not None else pipeline.text_encoder_2
    # Encoders that are offloaded are elsewhere until their hooks move them.
    device = pipeline._execution_device if hasattr(encoder, "_hf_hook") else encoder.device
    parts = []
    for begin in range(0, len(prompts), batch_size):
        encoded = pipeline.encode_prompt(
            list(prompts[begin : begin + batch_size]), device=device, num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        parts.append(Conditioning(encoded[0], encoded[2] if has_further_conditions(pipeline.unet) else None))
    return Conditioning.cat(parts)


@contextmanager
def encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Within the block, a pipeline's text encoders are on a device, and nothing else of it; then back on the CPU."""
    encoders = [one for one in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if one is not None]
    for encoder in encoders:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")


def encode_nothing(pipeline: Any) -> Conditioning:
    """The conditioning of one image for guidance without a negative prompt.

    It is that of the empty prompt, or zeros if the pipeline was trained so (``force_zeros_for_empty_prompt``).
    """
    empty = encode_prompts(pipeline, [""])
    if pipeline.config.get("force_zeros_for_empty_prompt", False):
        pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
        return Conditioning(torch.zeros_like(empty.states), pooled)
    return empty


def has_further_conditions(unet: Any) -> bool:
    """Whether a UNet also takes pooled text and image sizes, as Stable Diffusion XL's does."""
    return unet.config.addition_embed_type == _TEXT_TIME


@contextmanager
def recorded_map_sizes(mixers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[int, int]]]:
    """Record the height and width of the map that each mixer scans in the block, by the mixer's name."""
    sizes: dict[str, tuple[int, int]] = {}

    def record(name: str, _mixer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        sizes.setdefault(name, kwargs["map_size"])

    with ExitStack() as stack:
        for name, mixer in mixers.items():
            stack.enter_context(mixer.register_forward_pre_hook(partial(record, name), with_kwargs=True))
        yield sizes


def unet_arguments(unet: Any, text: Conditioning, height: int, width: int) -> dict[str, Any]:
    """The keyword arguments of a UNet for encoded prompts, besides the latents and the timestep.

    Stable Diffusion XL takes height and width, in pixels, as the original and the target size of the image.

    Raises:
        UsageError: The UNet needs conditions that a prompt and a size do not give.
    """
    config = unet.config
    unsupported = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    unmet = [key for key in unsupported if config.get(key) is not None]
    # "text" adds what it pools from the hidden states to the embedding of the time, and takes no further condition.
    if unmet or config.addition_embed_type not in (None, "text", _TEXT_TIME):
        name = unmet[0] if unmet else "addition_embed_type"
        raise UsageError(
            f"this UNet has {name}={config.get(name)!r}, but only the conditions of Stable Diffusion 1.5, 2.1 and XL "
            "are supported; use the pipeline of diffusers itself, with the adapter mounted on its UNet."
        )
    arguments: dict[str, Any] = {"encoder_hidden_states": text.states}
    if config.addition_embed_type == _TEXT_TIME:
        if text.pooled is None:
            raise UsageError(
                "this UNet takes pooled text, but the conditioning has none; encode the prompts with its pipeline."
            )
        sizes = torch.tensor([height, width, 0, 0, height, width]).to(text.pooled)
        arguments["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": sizes.expand(len(text), -1)}
    return arguments
