"""Noise: the chain of a training run, and the samplers of diffusers that walk it backwards."""

from __future__ import annotations

import inspect
from typing import Any

from ..core.errors import UsageError, nearest, require
from .config import DiffusionConfig

SAMPLERS: dict[str, str] = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}
"""Names of samplers, and the classes of diffusers that they are."""

_FLOW = ("flow", "flow-heun")


def training_scheduler(config: DiffusionConfig, *, pixels: bool) -> Any:
    """The scheduler whose noise a model learns: it is saved with the weights.

    Args:
        config: The run's section.
        pixels: The model learns images in [-1, 1], to which predictions are then clipped when sampling.
    """
    diffusers = require("diffusers", extra="diffusers")
    if config.objective == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.timesteps)
    return diffusers.DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_schedule=config.beta_schedule,
        variance_type="learned_range" if config.learned_sigma else "fixed_small",
        prediction_type=config.objective,
        clip_sample=pixels,
        timestep_spacing="trailing",
    )


def sampler(name: str, trained: Any) -> Any:
    """A sampler for a model, from the scheduler that it was trained with.

    Args:
        name: One of :data:`SAMPLERS`, or ``"auto"``: DDIM's steps, or Euler's for a flow.
        trained: The scheduler saved with the model.

    Raises:
        UsageError: there is none of that name, or it is not for models of this kind.
    """
    diffusers = require("diffusers", extra="diffusers")
    is_flow = type(trained).__name__.startswith("FlowMatch")
    if name == "auto":
        name = "flow" if is_flow else "ddim"
    if name not in SAMPLERS:
        raise UsageError(f"{name!r} is no sampler; use one of auto, {', '.join(SAMPLERS)}{nearest(name, SAMPLERS)}")
    if is_flow != (name in _FLOW):
        kind = "learned a flow" if is_flow else "learned noise on a chain of steps"
        fitting = [one for one in SAMPLERS if (one in _FLOW) == is_flow]
        raise UsageError(f"sampler {name!r} does not fit a model that {kind}; use one of {', '.join(fitting)}.")
    kind = getattr(diffusers, SAMPLERS[name])
    changes: dict[str, Any] = {}
    if name != "ddpm" and not is_flow:
        # The others take a variance of their own, or none.
        changes["variance_type"] = None if name == "dpm++" else "fixed_small"
    if name == "ddim":
        changes |= {"set_alpha_to_one": True, "steps_offset": 0}
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config(trained.config, **{key: value for key, value in changes.items() if key in known})
