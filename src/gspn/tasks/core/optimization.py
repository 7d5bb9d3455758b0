"""The optimizer and the learning-rate schedule of a configuration, by timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..._errors import UsageError, require
from .sections import OptimConfig, ScheduleConfig
from .task import Resolved


def make_optimizer(optim: OptimConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer, with the parameter groups of the model: no weight decay for some, and a rate by layer.

    Raises:
        UsageError: timm has no such optimizer, or it does not take these arguments.
    """
    further = dict(optim.options)
    for key in ("betas", "eps", "layer_decay"):
        if getattr(optim, key) is not None:
            further[key] = getattr(optim, key)
    try:
        return require("timm.optim").create_optimizer_v2(
            model, opt=optim.name, lr=lr, weight_decay=optim.weight_decay, momentum=optim.momentum, **further
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"optim.name {optim.name!r} with {further}: {error}.") from None


def make_scheduler(schedule: ScheduleConfig, optimizer: torch.optim.Optimizer, resolved: Resolved) -> Any:
    """The schedule over updates, set to the first update.

    It is a function of the number of updates alone, so a resumed run needs nothing else.

    Raises:
        UsageError: timm has no such schedule, it does not take these arguments, or it depends on evaluations.
    """
    if schedule.name == "plateau":
        raise UsageError(
            "schedule.name 'plateau' depends on evaluations; choose a schedule that is a function of the update."
        )
    try:
        scheduler, _ = require("timm.scheduler").create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=schedule.epochs - schedule.cooldown_epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=resolved.warmup_lr,
            min_lr=resolved.min_lr,
            step_on_epochs=False,
            updates_per_epoch=resolved.updates_per_epoch,
            **schedule.options,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"schedule.name {schedule.name!r} with {schedule.options}: {error}") from None
    scheduler.step_update(0)
    return scheduler
