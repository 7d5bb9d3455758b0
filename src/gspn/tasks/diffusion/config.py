"""The configuration section of the diffusion process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.config import setting

Objective = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise, and what the model predicts."""

    objective: Objective = "epsilon"
    """`epsilon` and `v_prediction` on DDPM's chain of steps, or `flow`: the velocity along straight lines."""
    timesteps: int = setting(1000, 2, 1_000_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Not used by `flow`."""
    learned_sigma: bool = True
    """Also predict the variance of each step, by the variational bound (arXiv 2102.09672); `epsilon` only."""
    sampling: Literal["uniform", "logit_normal"] = "uniform"
    """The distribution of a training image's time, for `flow`."""
    scaling: float = setting(1.0, above=0)
    """Factor on latents, beyond the autoencoder's own; 1 for images."""
