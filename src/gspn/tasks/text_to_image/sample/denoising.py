"""Denoising with a pipeline's UNet and scheduler: guidance, noise, and the loop over steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.seeding import derived_seed
from ..conditioning import Conditioning, unet_arguments


@dataclass(frozen=True)
class GuidanceInputs:
    """The encoded prompts of a batch of B images, and how guidance applies them."""

    text: Conditioning
    negative: Conditioning | None = None
    """None disables guidance."""
    scale: float = 1.0
    split: bool = False
    """Call the UNet twice a step instead of once with twice the batch: half the activations, a little slower."""

    def repeated(self, times: int) -> GuidanceInputs:
        """The inputs with each image repeated ``times`` times in a row."""

        def more(one: Conditioning) -> Conditioning:
            return one[torch.arange(len(one), device=one.states.device).repeat_interleave(times)]

        return GuidanceInputs(more(self.text), self.negative and more(self.negative), self.scale, self.split)


def predict(unet: Any, latents: Tensor, t: Any, inputs: GuidanceInputs, *, height: int, width: int) -> Tensor:
    r"""The UNet's prediction with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    .. math::
        p = p_{negative} + s\,(p_{text} - p_{negative})

    The latents ``[B, C, h, w]`` are scaled by the scheduler's ``scale_model_input``; height and width are those of the
    image in pixels. The result has the dtype of the latents, which may be wider than the UNet's.
    """

    def call(x: Tensor, text: Conditioning) -> Tensor:
        arguments = unet_arguments(unet, text, height, width)
        return unet(x.to(unet.dtype), t, **arguments, return_dict=False)[0].to(latents.dtype)

    if inputs.negative is None:
        return call(latents, inputs.text)
    if inputs.split:
        empty, full = call(latents, inputs.negative), call(latents, inputs.text)
    else:
        empty, full = call(torch.cat([latents] * 2), Conditioning.cat([inputs.negative, inputs.text])).chunk(2)
    return empty + inputs.scale * (full - empty)


def image_generators(seed: int, indices: Sequence[int], stage: int = 0) -> list[torch.Generator]:
    """One generator an image for one stage, seeded by ``seed``, the image's index and the stage alone.

    They are on the CPU, so that the noise is the same wherever the model runs.
    """
    return [torch.Generator().manual_seed(derived_seed(seed, "t2i", index, stage)) for index in indices]


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Standard normal noise ``[B, *shape]`` in float32, each image's from its own generator."""
    return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)


def first_step(steps: int, strength: float) -> int:
    """The first denoising step after noise of a strength was added to a finished image, as in img2img.

    Example:
        >>> first_step(30, 1.0), first_step(30, 0.42)
        (0, 18)
    """
    return max(steps - min(int(steps * strength), steps), 0)


def noise_level(scheduler: Any, step: int) -> tuple[float, float]:
    r"""The shares of signal and noise in the UNet's input at a step, :math:`\alpha^2 + \sigma^2 = 1`."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        ratio = float(sigmas[step])
        alpha = (1 + ratio**2) ** -0.5
        return alpha, ratio * alpha
    kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
    return kept**0.5, (1 - kept) ** 0.5


@torch.no_grad()
def denoise(
    unet: Any, scheduler: Any, latents: Tensor, inputs: GuidanceInputs, *, height: int, width: int,
    generators: Sequence[torch.Generator], begin: int = 0, blend: Callable[[Tensor, int], Tensor] | None = None,
    refine: Callable[[Tensor, Tensor, int], Tensor] | None = None, on_step: Callable[[], object] | None = None,
) -> Tensor:  # fmt: skip
    """Take the steps of a scheduler from noisy to clean latents, as diffusers' own pipelines do.

    The latents ``[B, C, h, w]`` keep their dtype, float32, whatever the UNet's. In float32 the result equals that of
    the pipelines. The scheduler's timesteps are set; ``begin`` is the first step that is taken, and height and width
    are those of the image in pixels. ``blend`` maps the latents and the number of a step to the latents that the step
    starts from, ``refine`` the UNet's input, its prediction and that number to the prediction that is used.

    Example:
        >>> denoise(pipeline.unet, scheduler, noise, inputs, height=512, width=768, generators=gs)  # doctest: +SKIP
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": list(generators)} if takes_generator else {}
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    for step in range(begin, len(scheduler.timesteps)):
        t = scheduler.timesteps[step]
        if blend is not None:
            latents = blend(latents, step)
        x = scheduler.scale_model_input(latents, t)
        prediction = predict(unet, x, t, inputs, height=height, width=width)
        if refine is not None:
            prediction = refine(x, prediction, step)
        latents = scheduler.step(prediction, t, latents, **step_options, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return latents
