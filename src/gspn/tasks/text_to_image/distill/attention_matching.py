"""A teacher with self-attention and a student with GSPN in its place, which share every other weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from gspn.diffusers import GSPNAdapter, GSPNTokenMixer

from ..conditioning import Conditioning, unet_arguments

Recorded = dict[str, tuple[Tensor, Tensor]]
"""By layer, what it was given and what it gave, ``[B, N, D]`` each."""


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[Recorded]:
    """What some modules are given and give while the block runs, each of them the first time.

    Under gradient checkpointing a module runs again in the backward pass, after the block: what it gives then is the
    same, and not recorded. What was recorded in the forward pass is a part of the graph as any activation.

    Args:
        modules: By name; called with the tokens first.
    """
    found: Recorded = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            del module
            found.setdefault(name, (args[0] if args else kwargs["hidden_states"], output))

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Distiller(nn.Module):
    """Teacher and student side by side; of its parameters and weights it knows the adapter's alone.

    So they are all that an optimiser, an average, a checkpoint and DDP see of it. A copy has another adapter and
    another student, and shares the teacher and all that is frozen.

    Args:
        teacher: a ``UNet2DConditionModel`` with its attentions; frozen.
        adapter: not mounted; in float32.
        height: of an image in pixels.
        width: likewise.
        relative: divide each layer's error by the mean square of the attention's output.
    """

    def __init__(self, teacher: Any, adapter: GSPNAdapter, height: int, width: int, *, relative: bool = False) -> None:
        super().__init__()
        self.adapter = adapter
        self.height = height
        self.width = width
        self.relative = relative
        teacher.requires_grad_(False).eval()
        # Another tree of modules over the same weights.
        student = copy.deepcopy(teacher, {id(p): p for p in (*teacher.parameters(), *teacher.buffers())})
        weights = {name: value.float().clone() for name, value in adapter.state_dict().items()}
        adapter.mount(student)
        # Mounted, it has the teacher's dtype: what that rounded is put back.
        nn.Module.float(adapter).load_state_dict(weights)
        adapter.requires_grad_(True)
        # In a tuple, which is not registered: frozen weights are nothing to train, to average, to send or to save.
        self._unets = (teacher, student)
        self._map_sizes: dict[tuple[int, ...], dict[str, tuple[int, int]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        adapter = copy.deepcopy(self.adapter, memo)
        return type(self)(self.teacher, adapter, self.height, self.width, relative=self.relative)

    @property
    def teacher(self) -> Any:
        """The UNet with its attentions."""
        return self._unets[0]

    @property
    def student(self) -> Any:
        """The UNet with the adapter mounted."""
        return self._unets[1]

    def place(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Move everything, the frozen weights included."""
        for unet in self._unets:
            unet.to(device)
            if channels_last:
                unet.to(memory_format=torch.channels_last)
        return self.to(device)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile teacher and student, each by itself."""
        for unet in self._unets:
            unet.compile(*args, **kwargs)

    def attentions(self) -> dict[str, nn.Module]:
        """The teacher's attentions that the adapter stands for."""
        return {name: self.teacher.get_submodule(name) for name in self.adapter.mixers}

    def forward(
        self, noisy: Tensor, t: Tensor, states: Tensor, pooled: Tensor | None = None, *, blocks: bool = False
    ) -> tuple[Tensor, ...]:
        """What teacher and student make of noisy latents.

        Args:
            noisy: ``[B, C, h, w]``.
            t: ``[B]``.
            states: encoded captions ``[B, L, D]``.
            pooled: ``[B, P]``, for Stable Diffusion XL.
            blocks: run no student, but each mixer on what the teacher's attention was given.

        Returns:
            The student's and the teacher's prediction ``[B, C, h, w]`` and the mean over the layers of the squared
            error of the attentions' outputs, ``[B]``; with ``blocks`` the last alone.
        """
        given = unet_arguments(self.teacher, Conditioning(states, pooled), self.height, self.width)
        with torch.no_grad(), recorded(self.attentions()) as wanted:
            guess = self.teacher(noisy, t, **given, return_dict=False)[0]
        if blocks:
            sizes = self.map_sizes(noisy, t, given)
            made = {name: mixer(wanted[name][0], map_size=sizes[name]) for name, mixer in self.adapter.mixers.items()}
            return (self._apart(made, wanted),)
        with recorded(self.adapter.mixers) as found:
            prediction = self.student(noisy, t, **given, return_dict=False)[0]
        return prediction, guess, self._apart({name: output for name, (_, output) in found.items()}, wanted)

    def _apart(self, made: Mapping[str, Tensor], wanted: Recorded) -> Tensor:
        layers = []
        for name, output in made.items():
            aim = wanted[name][1].float()
            apart = (output.float() - aim).square().flatten(1).mean(1)  # [B]
            if self.relative:
                apart = apart / aim.square().mean().clamp(min=1e-12)
            layers.append(apart)
        return torch.stack(layers).mean(0)

    @torch.no_grad()
    def map_sizes(self, noisy: Tensor, t: Tensor, given: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """Height and width of each layer's map, of latents of this shape: as the mounted student hands them over."""
        shape = tuple(noisy.shape[2:])
        if shape not in self._map_sizes:
            found: dict[str, tuple[int, int]] = {}

            def note(name: str) -> Any:
                return lambda _module, _args, kwargs: found.setdefault(name, kwargs["map_size"]) and None

            mixers: dict[str, GSPNTokenMixer] = self.adapter.mixers
            handles = [one.register_forward_pre_hook(note(name), with_kwargs=True) for name, one in mixers.items()]
            try:
                self.student(noisy, t, **given, return_dict=False)
            finally:
                for handle in handles:
                    handle.remove()
            self._map_sizes[shape] = found
        return self._map_sizes[shape]
