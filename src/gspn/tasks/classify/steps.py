"""The loss of a batch and the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import require
from ..core.loop import to_device
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Figures:
    """What an evaluation found; accuracies in percent."""

    loss: float
    top1: float
    top5: float
    images: int


def make_mixup(config: TrainConfig, num_classes: int) -> Any | None:
    """The ``Mixup`` of timm, where mixup or cutmix is on."""
    if not config.mixes:
        return None
    augment = config.augment
    return require("timm.data").Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        mode=augment.mix_mode,
        label_smoothing=config.optim.label_smoothing,
        num_classes=num_classes,
    )


def make_criterion(config: TrainConfig) -> nn.Module:
    """The training loss; where mixup is on it has smoothed the targets already."""
    loss = require("timm.loss")
    if config.mixes:
        return loss.SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    *,
    channels_last: bool = False,
    watch: Callable[[Tensor, Tensor], object] | None = None,
) -> Figures:
    """Loss and accuracies over the batches of all processes; targets of -1 do not count.

    Args:
        model: Takes images ``[B, 3, H, W]`` to logits ``[B, K]``; it is left in the mode it came in.
        batches: Of this process. Every process has as many.
        accelerator: Says where, in what precision, and who else.
        channels_last: The layout of the images.
        watch: Called with logits and targets that count, on the device.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=_counting_device(accelerator))
    for images, targets in batches:
        images = to_device(images, accelerator.device, channels_last)
        targets = targets.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = model(images)
        logits = logits.float()  # [B, K]
        counts = targets >= 0
        logits, targets = logits[counts], targets[counts]
        if watch is not None:
            watch(logits, targets)
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # [B, 5]
        found = (F.cross_entropy(logits, targets, reduction="sum"), best[:, 0].sum(), best.sum(), counts.sum())
        sums += torch.stack([one.to(sums) for one in found])
    model.train(was_training)
    loss, top1, top5, images = accelerator.reduce(sums, "sum").tolist()  # type: ignore[union-attr]
    most = max(images, 1)
    return Figures(loss / most, 100 * top1 / most, 100 * top5 / most, int(images))


def _counting_device(accelerator: Accelerator) -> torch.device:
    # Sums of millions of losses want float64, which Apple's GPU has not.
    return torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
