"""A teacher with self-attention and a student with GSPN in its place, which share every other weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from gspn.diffusers import GSPNAdapter

from ..conditioning import Conditioning, recorded_map_sizes, unet_arguments

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


class Distiller(nn.Module):
    """Teacher and student side by side. Its only registered parameters are the adapter's.

    An optimizer, an average, a checkpoint and DDP therefore see the adapter alone. A copy has its own adapter and
    student, and shares the teacher and all frozen weights. The teacher is frozen, and the adapter in float32 and not
    mounted; ``pixels`` of an image, along a side, are one of its latent. ``relative`` divides each layer's error by the
    mean square of the attention's output.
    """

    def __init__(self, teacher: Any, adapter: GSPNAdapter, pixels: int, *, relative: bool = False) -> None:
        super().__init__()
        self.adapter, self.pixels, self.relative = adapter, pixels, relative
        teacher.requires_grad_(False).eval()
        # Another tree of modules over the same weights.
        student = copy.deepcopy(teacher, {id(p): p for p in (*teacher.parameters(), *teacher.buffers())})
        weights = {name: value.float().clone() for name, value in adapter.state_dict().items()}
        adapter.mount(student)
        # Mounting converts to the teacher's dtype; this restores what was rounded.
        nn.Module.float(adapter).load_state_dict(weights)
        adapter.requires_grad_(True)
        # In a tuple, which is not registered: frozen weights are not trained, averaged, sent or saved.
        self._unets = (teacher, student)
        self._map_sizes: dict[tuple[int, ...], dict[str, tuple[int, int]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        adapter = copy.deepcopy(self.adapter, memo)
        return type(self)(self.teacher, adapter, self.pixels, relative=self.relative)

    @property
    def teacher(self) -> Any:
        """The UNet with its attentions."""
        return self._unets[0]

    @property
    def student(self) -> Any:
        """The UNet with the adapter mounted."""
        return self._unets[1]

    def move_to(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Move everything, including the frozen weights."""
        for unet in self._unets:
            unet.to(device)
            if channels_last:
                unet.to(memory_format=torch.channels_last)
        return self.to(device)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile teacher and student separately."""
        for unet in self._unets:
            unet.compile(*args, **kwargs)

    def attentions(self) -> dict[str, nn.Module]:
        """The teacher's attentions that the adapter replaces in the student."""
        return {name: self.teacher.get_submodule(name) for name in self.adapter.mixers}

    def arguments(self, noisy: Tensor, text: Conditioning) -> dict[str, Any]:
        """The arguments of both UNets for noisy latents ``[B, C, h, w]`` and their captions."""
        height, width = noisy.shape[-2:]
        return unet_arguments(self.teacher, text, height * self.pixels, width * self.pixels)

    def forward(
        self, noisy: Tensor, t: Tensor, states: Tensor, pooled: Tensor | None = None, *, blocks: bool = False
    ) -> tuple[Tensor, ...]:
        """The predictions of student and teacher for noisy latents ``[B, C, h, w]``, and the mixers' error ``[B]``.

        The error is the mean over the layers of the squared error against the attentions' outputs. With ``blocks`` no
        student runs, only each mixer on the input of the teacher's attention, and the error is returned alone.
        """
        arguments = self.arguments(noisy, Conditioning(states, pooled))
        with torch.no_grad(), recorded(self.attentions()) as attentions:
            target = self.teacher(noisy, t, **arguments, return_dict=False)[0]
        if blocks:
            sizes, mixers = self.map_sizes(noisy, t, arguments), self.adapter.mixers
            outputs = {name: mixer(attentions[name][0], map_size=sizes[name]) for name, mixer in mixers.items()}
            return (self._error(outputs, attentions),)
        with recorded(self.adapter.mixers) as mixed:
            prediction = self.student(noisy, t, **arguments, return_dict=False)[0]
        return prediction, target, self._error({name: output for name, (_, output) in mixed.items()}, attentions)

    def _error(self, outputs: Mapping[str, Tensor], attentions: Recorded) -> Tensor:
        """The mean over the layers of the squared error of the outputs, ``[B]``."""
        errors = []
        for name, output in outputs.items():
            target = attentions[name][1].float()
            error = (output.float() - target).square().flatten(1).mean(1)  # [B]
            if self.relative:
                error = error / target.square().mean().clamp(min=1e-12)
            errors.append(error)
        return torch.stack(errors).mean(0)

    @torch.no_grad()
    def map_sizes(self, noisy: Tensor, t: Tensor, arguments: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """Height and width of each layer's feature map for latents of this shape, as the student passes them."""
        shape = tuple(noisy.shape[2:])
        if shape not in self._map_sizes:
            with recorded_map_sizes(self.adapter.mixers) as sizes:
                self.student(noisy, t, **arguments, return_dict=False)
            self._map_sizes[shape] = sizes
        return self._map_sizes[shape]
