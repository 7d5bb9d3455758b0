"""The steps of a scheduler, checked: diffusers lets counts pass that end in an error, or in NaN, at the last step."""

from __future__ import annotations

from typing import Any

import torch

from .._errors import UsageError


def set_timesteps(
    scheduler: Any, steps: int, device: torch.device | str | None = None, *, as_it_is: bool = False
) -> None:
    """Call ``scheduler.set_timesteps(steps)``, and raise unless every step leads on.

    A chain of noise has as many levels of noise as it was trained with. Where there are more steps than levels, or the
    spacing of the steps leaves the chain, schedulers of diffusers index beyond its end or divide by zero.

    For some counts, such as 61 and 103 of 1,000, the spacing ``"trailing"`` gives a step too many by rounding, at -1.
    It is removed, unless ``as_it_is``: then such a count is refused, for pipelines that set the steps themselves.

    Raises:
        UsageError: The scheduler cannot take so many steps; the message says how many it can.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from gspn.diffusers.timesteps import set_timesteps
        >>> set_timesteps(DDIMScheduler(steps_offset=1), 1000)
        Traceback (most recent call last):
        gspn._errors.UsageError: 1000 steps: this DDIMScheduler takes 999 or fewer (1000 is beyond the last level, 999).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"{steps!r} steps: pass an integer of at least 1.")
    problem = _problem(scheduler, steps, device, as_it_is)
    if problem is None:
        return
    kind, fewer = type(scheduler).__name__, min(steps - 1, len(getattr(scheduler, "betas", range(1000))))
    most = next((n for n in range(fewer, 0, -1) if _problem(scheduler, n, None, as_it_is) is None), None)
    if most is None:
        raise UsageError(f"this {kind} takes no number of steps ({problem}); choose another scheduler.")
    raise UsageError(f"{steps} steps: this {kind} takes {most} or fewer ({problem}).")


def _problem(scheduler: Any, steps: int, device: torch.device | str | None, as_it_is: bool) -> str | None:
    """Set the steps; what is wrong with them, or None."""
    last = len(getattr(scheduler, "alphas_cumprod", ())) - 1  # of a chain; others have times of their own
    try:
        scheduler.set_timesteps(steps, device=device)
    except (ValueError, TypeError, IndexError, NotImplementedError, ArithmeticError, RuntimeError) as error:
        if 0 <= last < steps - 1:
            return f"the model was trained with {last + 1}"
        return " ".join(str(error).split())[:200]  # its configuration does not fit
    if not as_it_is and last >= 0 and len(scheduler.timesteps) == steps + 1 and scheduler.timesteps[-1] < 0:
        scheduler.timesteps, scheduler.num_inference_steps = scheduler.timesteps[:steps], steps
        if getattr(scheduler, "sigmas", None) is not None:
            scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
    times, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if last >= 0 and times.max() > last:
        return f"{times.max():g} is beyond the last level, {last}"
    if last >= 0 and times.min() < 0:
        return f"a step at {times.min():g}, below the first level"
    levels = times if sigmas is None else sigmas[:-1]
    if not levels.isfinite().all():
        return "a level of noise is not finite"
    return "levels of noise repeat" if len(levels.unique()) < steps else None
