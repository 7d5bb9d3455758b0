"""A teacher with self-attention and a student with GSPN in its place, which share every other weight."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor

from gspn.diffusers import GSPNAdapter

from ...core.attention_matching import AttentionMatcher, Recorded, matching_error, recorded
from ..conditioning import Conditioning, recorded_map_sizes, unet_arguments


class Distiller(AttentionMatcher):
    """A UNet with its attentions and one with the adapter mounted; a copy shares the teacher and all frozen weights.

    ``pixels`` of an image, along a side, are one of its latent. ``relative`` divides each layer's error by the mean
    square of the attention's output.
    """

    def __init__(self, teacher: Any, adapter: GSPNAdapter, pixels: int, *, relative: bool = False) -> None:
        super().__init__(teacher, adapter)
        self.pixels, self.relative = pixels, relative
        self._map_sizes: dict[tuple[int, ...], dict[str, tuple[int, int]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        adapter = copy.deepcopy(self.adapter, memo)
        return type(self)(self.teacher, adapter, self.pixels, relative=self.relative)

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

    def _error(self, outputs: dict[str, Tensor], attentions: Recorded) -> Tensor:
        targets = {name: output for name, (_, output) in attentions.items()}
        return matching_error(outputs, targets, relative=self.relative)

    @torch.no_grad()
    def map_sizes(self, noisy: Tensor, t: Tensor, arguments: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """Height and width of each layer's feature map for latents of this shape, as the student passes them."""
        shape = tuple(noisy.shape[2:])
        if shape not in self._map_sizes:
            with recorded_map_sizes(self.adapter.mixers) as sizes:
                self.student(noisy, t, **arguments, return_dict=False)
            self._map_sizes[shape] = sizes
        return self._map_sizes[shape]
