"""Checks in several processes, each of which has some rows of an image."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gspn.distributed import ImageRows
from tasks.processes import start_many


def _worker(checks: Any, folder: Path, groups: int = 1) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, count = dist.get_rank(), dist.get_world_size() // groups
    group = None
    for first in range(0, dist.get_world_size(), count):
        made = dist.new_group(list(range(first, first + count)))
        group = made if first <= rank < first + count else group
    for check in checks:
        torch.manual_seed(1)
        random.seed(1)
        check(group if groups > 1 else None)
        dist.barrier()
    (folder / str(rank)).touch()
    dist.destroy_process_group()


def over(count: int, folder: Path, *checks: Any, groups: int = 1) -> None:
    start_many(count, folder / "printed.txt", _worker, checks, folder, groups)
    assert len(list(folder.glob("[0-9]"))) == count, (folder / "printed.txt").read_text()


def near(one: Tensor, other: Tensor, what: str = "") -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def average(parameters: Any, group: Any) -> list[Tensor]:
    """The gradients' averages over the processes, as DistributedDataParallel takes them."""
    grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    for grad in grads:
        dist.all_reduce(grad, group=group)
    return [grad / dist.get_world_size(group) for grad in grads]


def near_whole(name: str, model: nn.Module, call: Any, image: Tensor, group: Any, multiple: int = 2) -> None:
    torch.manual_seed(3)
    image = image.clone().requires_grad_()
    whole = listed(call(model, image))
    torch.manual_seed(2)
    weights = [torch.randn_like(one) for one in whole]
    sum((one * weight).mean() for one, weight in zip(whole, weights, strict=True)).backward()  # type: ignore[union-attr]
    expected = [one.grad for one in (image, *model.parameters()) if one.grad is not None]
    model.zero_grad()
    image.grad = None

    rows = ImageRows(image.shape[2], image.shape[3], multiple=multiple, group=group)
    torch.manual_seed(3)
    with rows.applied(model):
        parts = listed(call(model, rows.take(image)))
        losses = []
        for part, weight, one in zip(parts, weights, whole, strict=True):
            if part.dim() == 4:
                near(rows.gather(part), one, name)
                of = rows.map_of(part)
                mine = weight[:, :, of.starts[rows.rank] : of.starts[rows.rank + 1]]
                losses.append(rows.mean(part * mine))
            else:
                near(part, one, name)
                losses.append((part * weight).mean())
        sum(losses).backward()  # type: ignore[union-attr]
    assert not any("forward" in vars(one) for one in model.modules())
    actual = average([one for one in (image, *model.parameters()) if one.grad is not None], group)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        near(one, other, f"{name}: gradient {i}")


def listed(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, list | tuple) else [out]
