"""Schedulers of diffusers: the one that a model is trained with, and those that sample from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._errors import UsageError, nearest, require
from .config import DiffusionConfig

SCHEDULERS: dict[str, str] = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}
"""Names of schedulers and their classes in diffusers. Those for chains of noise call the model once a step."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""The prediction types of models of a chain of noise that are supported."""

_FLOWS = ("flow", "flow-heun")


def training_scheduler(config: DiffusionConfig, *, pixels: bool) -> Any:
    """The scheduler whose noise a model learns to remove. It is saved with the weights.

    ``pixels``: the model learns images in [-1, 1], to which predictions are then clipped when sampling.
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


def check_chain(trained: Any, predictions: Sequence[str] = PREDICTIONS) -> str:
    """The prediction type of models that were trained on a chain of noise, by the pipeline's scheduler.

    Raises:
        UsageError: The scheduler is not that of a chain of noise, or its prediction type is not supported.
    """
    prediction, name = trained.config.get("prediction_type", "epsilon"), type(trained).__name__
    # A flow's configuration could be read as that of a chain.
    if name.startswith(("FlowMatch", "EDM")) or prediction not in predictions:
        raise UsageError(
            f"this pipeline's scheduler is a {name} with prediction_type={prediction!r}; supported are chains of noise "
            f"that predict one of {', '.join(predictions)}. Use the pipeline of diffusers itself."
        )
    return prediction


def named_scheduler(name: str, trained: Any, *, auto: str = "ddim") -> Any:
    """A new scheduler that samples from a model, with the configuration of the one that it was trained with.

    The name is one of :data:`SCHEDULERS`, or ``"auto"``: the class of ``trained``, if it is one of them and not DDPM,
    which needs hundreds of steps, else ``auto``.

    Raises:
        UsageError: The name is unknown, or the scheduler does not fit the model.

    Example:
        >>> from diffusers import PNDMScheduler
        >>> type(named_scheduler("euler", PNDMScheduler())).__name__
        'EulerDiscreteScheduler'
    """
    diffusers, kind = require("diffusers", extra="diffusers"), type(trained).__name__
    is_flow = kind.startswith("FlowMatch")
    if name == "auto":
        if kind in SCHEDULERS.values() and kind != SCHEDULERS["ddpm"]:
            return type(trained).from_config(trained.config)  # also where it is a variant that has no name here
        name = auto
    if name not in SCHEDULERS:
        raise UsageError(
            f"scheduler {name!r} is unknown; use one of auto, {', '.join(SCHEDULERS)}{nearest(name, SCHEDULERS)}"
        )
    if is_flow != (name in _FLOWS):
        learned = "a flow" if is_flow else "noise on a chain of steps"
        fitting = [one for one in SCHEDULERS if (one in _FLOWS) == is_flow]
        raise UsageError(
            f"scheduler {name!r} does not fit a model that learned {learned}; use one of {', '.join(fitting)}."
        )
    if name == "euler_a" and trained.config.get("prediction_type") == "sample":
        raise UsageError(f"scheduler {name!r} does not run models that predict the sample; use ddim, dpm++ or euler.")
    changes: dict[str, Any] = {}
    if name.startswith("dpm++"):
        changes = {"algorithm_type": "sde-dpmsolver++" if name == "dpm++_sde" else "dpmsolver++", "variance_type": None}
    return getattr(diffusers, SCHEDULERS[name]).from_config(trained.config, **changes)
