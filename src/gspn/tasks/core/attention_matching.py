"""A teacher with self-attention and a student with GSPN in its place, which share every other weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

Recorded = dict[str, tuple[Tensor, Tensor]]
"""By layer: its input and its output, ``[B, N, D]`` each."""


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[Recorded]:
    """Record input and output of modules during the block, each at its first call.

    Under gradient checkpointing a module runs again in the backward pass, after the block, with the same output, which
    is not recorded. The recorded tensors are part of the graph like any activation. The modules' first argument is the
    tokens.
    """
    record: Recorded = {}

    def keep(name: str, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        record.setdefault(name, (args[0] if args else kwargs["hidden_states"], output))

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(partial(keep, name), with_kwargs=True))
        yield record


def matching_error(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, relative: bool) -> Tensor:
    """The mean over the layers of the squared error of the outputs, ``[B]``.

    ``relative`` divides each layer's error by the mean square of its target.
    """
    errors = []
    for name, output in outputs.items():
        target = targets[name].float()
        error = (output.float() - target).square().flatten(1).mean(1)  # [B]
        if relative:
            error = error / target.square().mean().clamp(min=1e-12)
        errors.append(error)
    return torch.stack(errors).mean(0)


def sharing_copy(model: Any) -> Any:
    """Another tree of modules over the same weights."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


class AttentionMatcher(nn.Module):
    """Teacher and student side by side. Its only registered parameters are the adapter's.

    An optimizer, an average, a checkpoint and DDP therefore see the adapter alone. The teacher is frozen. The adapter
    is mounted on the student, which shares all frozen weights, and in float32.

    Args:
        teacher: the model whose attentions are matched.
        adapter: a ``GSPNAdapter``, not mounted, with mixers for layers of the teacher.
        student: the model to mount it on; None for a copy of the teacher over the same weights.
    """

    def __init__(self, teacher: Any, adapter: Any, student: Any = None) -> None:
        super().__init__()
        self.adapter = adapter
        student = sharing_copy(teacher) if student is None else student
        for model in (teacher, student):
            model.requires_grad_(False).eval()
        weights = {name: value.float().clone() for name, value in adapter.state_dict().items()}
        adapter.mount(student)
        # Mounting converts to the teacher's dtype; this restores what was rounded.
        nn.Module.float(adapter).load_state_dict(weights)
        adapter.requires_grad_(True)
        # In a tuple, which is not registered: frozen weights are not trained, averaged, sent or saved.
        self._models = (teacher, student)

    @property
    def teacher(self) -> Any:
        """The model with its attentions."""
        return self._models[0]

    @property
    def student(self) -> Any:
        """The model with the adapter mounted."""
        return self._models[1]

    def move_to(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Move everything, including the frozen weights."""
        for model in self._models:
            model.to(device)
            if channels_last:
                model.to(memory_format=torch.channels_last)
        return self.to(device)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile teacher and student separately."""
        for model in self._models:
            model.compile(*args, **kwargs)

    def attentions(self) -> dict[str, nn.Module]:
        """The teacher's attentions that the adapter replaces in the student."""
        return {name: self.teacher.get_submodule(name) for name in self.adapter.mixers}
