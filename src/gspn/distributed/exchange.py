"""Exchanges between processes, with derivatives, beside computation where the backend has streams or threads."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._errors import ProcessLostError

Group = dist.ProcessGroup | None
"""A group of processes; None is that of all."""


class _Transfer:
    """One exchange of numbers under way, and that of its gradients on the way back.

    Args:
        to: How many numbers go to each process.
        of: How many come from each.
        group: The processes.
    """

    def __init__(self, to: Sequence[int], of: Sequence[int], group: Group) -> None:
        self.to, self.of, self.group = to, of, group
        self.back: _Transfer | None = None
        self._pending: tuple[Any, Tensor] | None = None

    def start(self, sent: Tensor) -> Tensor:
        """Send the first numbers; after a wait the tensor that is returned, as long, begins with those of others."""
        received = torch.empty_like(sent)
        # Bytes: not every backend knows every dtype.
        of, to = ([n * sent.element_size() for n in counts] for counts in (self.of, self.to))
        own, others = (one.view(torch.uint8)[: sum(counts)] for one, counts in ((sent, to), (received, of)))
        with naming_lost_process(self.group):
            work = dist.all_to_all_single(others, own, of, to, self.group, async_op=True)
        self._pending = work, sent  # which must live until it is sent
        return received

    def wait(self) -> None:
        """Return when everything is received; on a GPU, when the stream that computes waits for it."""
        if self._pending is not None:
            with naming_lost_process(self.group):
                self._pending[0].wait()
        self._pending = None


# The adjoint of an exchange is the same with both ends swapped. It is begun where the exchange was waited for, and
# waited for where that began, so that gradients, too, travel beside what is computed in between. This holds for
# derivatives of every order.


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(sent: Tensor, transfer: _Transfer) -> Tensor:
        return transfer.start(sent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.transfer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Finish.apply(grad, ctx.transfer.back), None  # type: ignore[return-value]


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(received: Tensor, transfer: _Transfer) -> Tensor:
        transfer.wait()
        return received.view_as(received)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.transfer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        one = ctx.transfer
        one.back = _Transfer(one.of, one.to, one.group)
        return _Start.apply(grad.contiguous(), one.back), None  # type: ignore[return-value]


def start(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> Callable[[], list[Tensor]]:
    """Begin to send part q to process q; the function that is returned waits for a tensor from each, of these shapes.

    A process's own part is not copied.
    """
    rank = dist.get_rank(group)
    to = [0 if q == rank else part.numel() for q, part in enumerate(parts)]
    of = [0 if p == rank else math.prod(shape) for p, shape in enumerate(shapes)]
    # One length for what is sent and received, so that gradients have it as well; what is beyond either is not used.
    beyond = parts[rank].new_empty(max(sum(to), sum(of)) - sum(to))
    sent = torch.cat([*(part.reshape(-1) for q, part in enumerate(parts) if q != rank), beyond])
    transfer, own = _Transfer(to, of, group), parts[rank]
    received: Any = _Start.apply(sent, transfer)

    def finish() -> list[Tensor]:
        pieces = _Finish.apply(received, transfer)[: sum(of)].split(of)  # type: ignore[union-attr]
        return [own if p == rank else pieces[p].view(tuple(shape)) for p, shape in enumerate(shapes)]

    return finish


def exchange(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """:func:`start`, and wait."""
    return start(parts, shapes, group)()


def gathered(x: Tensor, group: Group) -> Tensor:
    """The tensors of all processes, which have one shape, stacked in their order."""
    count = dist.get_world_size(group)
    return torch.stack(exchange([x] * count, [x.shape] * count, group))


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of the tensors of all processes, in their order: the same bits on each."""
    return gathered(x, group).sum(0)


@contextlib.contextmanager
def naming_lost_process(group: Group = None) -> Iterator[None]:
    """Let errors of a backend in the block say that another process has ended or does not answer.

    Raises:
        ProcessLostError: An exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessLostError):
            raise
        # The first sentence of a backend's message, without the place in its source.
        reason = re.sub(r"^\[\S+:\d+\]\s*|\. .*", "", (str(error).splitlines() or [type(error).__name__])[0])
        raise ProcessLostError(
            f"process {dist.get_rank()} stops: another of the {dist.get_world_size(group)} that share the work has "
            f"ended, or has not answered in time ({reason[:200]}). Look for the first error of all, and start again."
        ) from error
