"""Exchanges between processes, with derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
"""A group of processes; None is that of all."""


class _AllToAll(torch.autograd.Function):
    """Numbers to and from every process: its adjoint is the same with both swapped, of every order."""

    @staticmethod
    def forward(sent: Tensor, to: Sequence[int], of: Sequence[int], group: Group) -> Tensor:
        received = sent.new_empty(sum(of))
        # Bytes: not every backend knows every dtype.
        size = sent.element_size()
        dist.all_to_all_single(
            received.view(torch.uint8), sent.view(torch.uint8), [n * size for n in of], [n * size for n in to], group
        )
        return received

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.to, ctx.of, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _AllToAll.apply(grad.contiguous(), ctx.of, ctx.to, ctx.group), None, None, None  # type: ignore[return-value]


def exchange(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """Send part q to process q, and receive a tensor from each, of these shapes. A process's own part is not copied."""
    rank = dist.get_rank(group)
    to = [0 if q == rank else part.numel() for q, part in enumerate(parts)]
    of = [0 if p == rank else math.prod(shape) for p, shape in enumerate(shapes)]
    sent = torch.cat([part.reshape(-1) for q, part in enumerate(parts) if q != rank] or [parts[rank].new_empty(0)])
    received = _AllToAll.apply(sent, to, of, group).split(of)  # type: ignore[union-attr]
    return [parts[rank] if p == rank else received[p].view(tuple(shape)) for p, shape in enumerate(shapes)]


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of the tensors of all processes, in their order: the same bits on each."""
    count = dist.get_world_size(group)
    return torch.stack(exchange([x] * count, [x.shape] * count, group)).sum(0)
