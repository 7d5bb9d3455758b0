"""Denoising with a pipeline's UNet and scheduler: schedulers by name, guidance, and the loop over steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UsageError, nearest, require
from ..core.seeding import derived_seed
from .conditioning import Conditioning, unet_arguments

SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
}
"""Scheduler names and their classes in diffusers: those that call the UNet once a step."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""The prediction types of a UNet that are supported."""

_FALLBACK = "dpm++"


def check_chain(trained: Any, predictions: Sequence[str]) -> str:
    """The prediction type of a scheduler, checked.

    Args:
        trained: The pipeline's scheduler.
        predictions: The prediction types that the caller supports.

    Raises:
        UsageError: The scheduler does not add noise in discrete steps, or its prediction type is not supported.
    """
    prediction, name = trained.config.get("prediction_type", "epsilon"), type(trained).__name__
    # The configs of these two families read like a noise schedule, but they describe another process.
    if name.startswith(("FlowMatch", "EDM")) or prediction not in predictions:
        raise UsageError(
            f"this pipeline's scheduler is a {name} with prediction_type={prediction!r}; supported are discrete noise "
            f"schedules that predict one of {', '.join(predictions)}. Use the pipeline of diffusers itself."
        )
    return prediction


def named_scheduler(name: str, trained: Any) -> Any:
    """A new scheduler by name, with the noise schedule of a pipeline's own.

    Args:
        name: One of :data:`SCHEDULERS`, or ``"auto"``: the pipeline's own scheduler, except that DPM-Solver++ replaces
            PNDM, which cannot start midway, and DDPM, which needs hundreds of steps.
        trained: The pipeline's scheduler.

    Raises:
        UsageError: The name is unknown, or the scheduler does not support this pipeline's prediction type.

    Example:
        >>> from diffusers import PNDMScheduler
        >>> type(named_scheduler("euler", PNDMScheduler())).__name__
        'EulerDiscreteScheduler'
    """
    diffusers = require("diffusers", extra="diffusers")
    prediction = check_chain(trained, PREDICTIONS)
    if name == "auto":
        own = {kind: one for one, kind in reversed(SCHEDULERS.items())}.get(type(trained).__name__, _FALLBACK)
        if own not in ("ddpm", _FALLBACK):
            return type(trained).from_config(trained.config)
        # A pipeline's own DPM-Solver++ may be a variant, such as the SDE one: its config is kept.
        is_own = type(trained).__name__ == SCHEDULERS[_FALLBACK]
        return type(trained).from_config(trained.config) if is_own else named_scheduler(_FALLBACK, trained)
    if name not in SCHEDULERS:
        raise UsageError(
            f"scheduler {name!r} is unknown; use one of auto, {', '.join(SCHEDULERS)}{nearest(name, SCHEDULERS)}"
        )
    if name == "euler_a" and prediction == "sample":
        raise UsageError(f"scheduler {name!r} does not run models that predict the sample; use ddim, dpm++ or euler.")
    kind = getattr(diffusers, SCHEDULERS[name])
    changes: dict[str, Any] = {}
    if name.startswith("dpm++"):
        changes = {"algorithm_type": "sde-dpmsolver++" if name == "dpm++_sde" else "dpmsolver++", "variance_type": None}
    return kind.from_config(trained.config, **changes)


@dataclass(frozen=True)
class GuidanceInputs:
    """The conditioning of a batch of B images, and how guidance applies it.

    Attributes:
        text: The encoded prompts, ``[B, ...]``.
        negative: The encoded negative prompts, ``[B, ...]``; None disables guidance.
        scale: The scale of classifier-free guidance.
        split: Call the UNet twice a step instead of once with twice the batch: half the activations, a little slower.
    """

    text: Conditioning
    negative: Conditioning | None = None
    scale: float = 1.0
    split: bool = False

    def repeated(self, times: int) -> GuidanceInputs:
        """The inputs with each image repeated ``times`` times in a row."""

        def more(one: Conditioning) -> Conditioning:
            return one[torch.arange(len(one), device=one.states.device).repeat_interleave(times)]

        return GuidanceInputs(more(self.text), self.negative and more(self.negative), self.scale, self.split)


def predict(unet: Any, latents: Tensor, t: Any, inputs: GuidanceInputs, *, height: int, width: int) -> Tensor:
    r"""The UNet's prediction with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    .. math::
        p = p_{negative} + s\,(p_{text} - p_{negative})

    Args:
        unet: A ``UNet2DConditionModel``.
        latents: ``[B, C, h, w]``, scaled by the scheduler's ``scale_model_input``.
        t: The timestep.
        inputs: The conditioning of the B images.
        height: Of the image, in pixels, for UNets that are conditioned on it.
        width: Of the image, in pixels, for UNets that are conditioned on it.

    Returns:
        ``[B, C, h, w]`` in the dtype of ``latents``, which may be wider than the UNet's.
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
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    inputs: GuidanceInputs,
    *,
    height: int,
    width: int,
    generators: Sequence[torch.Generator],
    begin: int = 0,
    blend: Callable[[Tensor, int], Tensor] | None = None,
    refine: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Take the steps of a scheduler from noisy to clean latents, as diffusers' own pipelines do.

    The latents keep their dtype, float32, whatever the UNet's. In float32 the result equals that of the pipelines.

    Args:
        unet: A ``UNet2DConditionModel``.
        scheduler: A scheduler whose timesteps are set.
        latents: The noisy latents, ``[B, C, h, w]``.
        inputs: The conditioning of the B images.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        generators: One an image, for schedulers that add noise.
        begin: The first step.
        blend: Maps the latents and the number of a step to the latents that the step starts from.
        refine: Maps the UNet's input, its prediction and the number of a step to the prediction that is used.
        on_step: Called after each step.

    Returns:
        The latents after the last step, ``[B, C, h, w]``.

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
