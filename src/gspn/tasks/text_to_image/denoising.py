"""Denoising with the parts of a pipeline: schedulers by name, guidance, and the loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.seeding import derived_seed
from ..diffusion import schedulers
from ..diffusion.schedulers import check_chain
from .conditioning import Conditioning, unet_arguments


def named_scheduler(name: str, trained: Any) -> Any:
    """A scheduler for a pipeline of a chain of noise; see :func:`gspn.tasks.diffusion.schedulers.named_scheduler`."""
    check_chain(trained)
    return schedulers.named_scheduler(name, trained, auto="dpm++")


def fresh(scheduler: Any) -> Any:
    """A scheduler like this one that has taken no step."""
    return type(scheduler).from_config(scheduler.config)


@dataclass(frozen=True)
class Guide:
    """What pulls on a batch of images.

    Attributes:
        text: Of their prompts, ``[B, ...]``.
        negative: What guidance leads away from, ``[B, ...]``; None for none.
        scale: Of classifier-free guidance.
        split: Call the UNet twice instead of with a batch of twice the size: half the activations, a little slower.
    """

    text: Conditioning
    negative: Conditioning | None = None
    scale: float = 1.0
    split: bool = False

    def repeated(self, times: int) -> Guide:
        """For each image as many times in a row."""

        def more(one: Conditioning) -> Conditioning:
            return one[torch.arange(len(one), device=one.states.device).repeat_interleave(times)]

        return Guide(more(self.text), self.negative and more(self.negative), self.scale, self.split)


def predict(unet: Any, latents: Tensor, t: Any, guide: Guide, *, height: int, width: int) -> Tensor:
    r"""What a UNet predicts under classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    .. math::
        p = p_{negative} + s\,(p_{text} - p_{negative})

    Args:
        unet: A ``UNet2DConditionModel``.
        latents: ``[B, C, h, w]``, as the scheduler scales its input.
        t: The time.
        guide: For B images.
        height: That the UNet is told, in pixels.
        width: Likewise.

    Returns:
        ``[B, C, h, w]``, of the dtype of ``latents``, which may be finer than the UNet's.
    """

    def call(x: Tensor, text: Conditioning) -> Tensor:
        arguments = unet_arguments(unet, text, height, width)
        return unet(x.to(unet.dtype), t, **arguments, return_dict=False)[0].to(latents.dtype)

    if guide.negative is None:
        return call(latents, guide.text)
    if guide.split:
        empty, full = call(latents, guide.negative), call(latents, guide.text)
    else:
        empty, full = call(torch.cat([latents] * 2), Conditioning.cat([guide.negative, guide.text])).chunk(2)
    return empty + guide.scale * (full - empty)


def image_generators(seed: int, indices: Sequence[int], stage: int = 0) -> list[torch.Generator]:
    """The randomness of some images at one stage, of each from the seed and its own index alone.

    On the CPU, so that it is the same wherever the model runs.
    """
    return [torch.Generator().manual_seed(derived_seed(seed, "t2i", index, stage)) for index in indices]


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Normal noise ``[B, *shape]`` in float32, an image's from its own generator."""
    return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)


def begin_of(steps: int, strength: float) -> int:
    """The first step that is taken where noise of a strength was added to something finished, as img2img has it.

    Example:
        >>> begin_of(30, 1.0), begin_of(30, 0.42)
        (0, 18)
    """
    return max(steps - min(int(steps * strength), steps), 0)


def noise_level(scheduler: Any, step: int) -> tuple[float, float]:
    r"""The shares of signal and noise in what the UNet is given at a step: :math:`\alpha^2 + \sigma^2 = 1`."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        ratio = float(sigmas[step])
        alpha = (1 + ratio**2) ** -0.5
        return alpha, ratio * alpha
    kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
    return kept**0.5, (1 - kept) ** 0.5


@torch.no_grad()
def denoise(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    guide: Guide,
    *,
    height: int,
    width: int,
    generators: Sequence[torch.Generator],
    begin: int = 0,
    blend: Callable[[Tensor, int], Tensor] | None = None,
    refine: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Walk a scheduler's chain backwards, as diffusers' own pipelines do.

    The latents keep their dtype, float32, whatever that of the UNet; in float32 the result is the pipelines' own.

    Args:
        unet: A ``UNet2DConditionModel``.
        scheduler: With its timesteps set.
        latents: Noisy, ``[B, C, h, w]``.
        guide: For B images.
        height: In pixels, which the UNet is told.
        width: Likewise.
        generators: One an image, for schedulers that add noise.
        begin: The first step.
        blend: What becomes of the latents before each step, given them and the number of the step.
        refine: What becomes of a prediction, given the UNet's input, the prediction and the number of the step.
        on_step: Called after each step.

    Returns:
        ``[B, C, h, w]``.

    Example:
        >>> denoise(pipeline.unet, scheduler, noise, guide, height=512, width=768, generators=gs)  # doctest: +SKIP
    """
    further: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        further["generator"] = list(generators)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    for step in range(begin, len(scheduler.timesteps)):
        t = scheduler.timesteps[step]
        if blend is not None:
            latents = blend(latents, step)
        x = scheduler.scale_model_input(latents, t)
        prediction = predict(unet, x, t, guide, height=height, width=width)
        if refine is not None:
            prediction = refine(x, prediction, step)
        latents = scheduler.step(prediction, t, latents, **further, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return latents
