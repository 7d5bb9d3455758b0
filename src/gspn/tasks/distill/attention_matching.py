"""A vision transformer and the same one with GSPN in the place of its attention, and how far apart they are."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn.timm import GSPNAdapter

from ..core.attention_matching import AttentionMatcher, matching_error, recorded, sharing_copy
from .config import DistillationConfig


class Distiller(AttentionMatcher):
    """Teacher and student; a copy has its own adapter and student, and shares the teacher and all frozen weights.

    Args:
        teacher: the model whose attentions are matched, at its own size; a former student has its adapter mounted.
        base: the model without any adapter, at the student's size.
        adapter: that of the student, not mounted.
        config: which errors are computed; those of weight 0 are not.
    """

    def __init__(self, teacher: Any, base: Any, adapter: GSPNAdapter, config: DistillationConfig) -> None:
        super().__init__(teacher, adapter, sharing_copy(base))
        self._base, self.config = (base,), config

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.teacher, self._base[0], copy.deepcopy(self.adapter, memo), self.config)

    def move_to(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Move everything, including the frozen weights."""
        self._base[0].to(device)
        return super().move_to(device, channels_last=channels_last)

    def forward(self, images: Tensor, *, blocks: bool = False) -> dict[str, Tensor]:
        """The errors of images ``[B, 3, H, W]``, each ``[B]``.

        ``propagation`` is that of the mixers' outputs, ``blocks`` of their blocks' outputs, ``features`` of the last
        tokens, and ``logits`` the divergence of the class probabilities; ``predicted`` and ``teacher_predicted`` are
        classes. With the argument ``blocks`` no student runs, only each mixer on the input of the teacher's attention,
        and the result is ``propagation`` alone.
        """
        names = list(self.adapter.mixers)
        around = [name.rpartition(".")[0] for name in names]
        with torch.no_grad():
            small = self.teachers_view(images)
            with (
                recorded(self.attentions()) as attentions,
                recorded({name: self.teacher.get_submodule(name) for name in around}) as teachers_blocks,
            ):
                last = self.teacher.forward_features(small)
                logits = self.teacher.forward_head(last) if self.teacher.num_classes else None
            targets = {name: self.enlarged(output) for name, (_, output) in attentions.items()}
        if blocks:
            inputs = {name: self.enlarged(tokens) for name, (tokens, _) in attentions.items()}
            size = self.student.patch_embed.grid_size
            outputs = {name: mixer(inputs[name], map_size=size) for name, mixer in self.adapter.mixers.items()}
            return {"propagation": matching_error(outputs, targets, relative=True)}
        with (
            recorded(self.adapter.mixers) as mixed,
            recorded({name: self.student.get_submodule(name) for name in around}) as students_blocks,
        ):
            students_last = self.student.forward_features(images)
            students_logits = None if logits is None else self.student.forward_head(students_last)

        def error(outputs: dict[str, tuple[Tensor, Tensor]], those: dict[str, Tensor]) -> Tensor:
            return matching_error({name: output for name, (_, output) in outputs.items()}, those, relative=True)

        parts = {
            "propagation": error(mixed, targets),
            "blocks": error(students_blocks, {name: self.enlarged(out) for name, (_, out) in teachers_blocks.items()}),
            "features": matching_error({"": students_last}, {"": self.enlarged(last)}, relative=True),
        }
        if logits is None or students_logits is None:
            return parts
        heat = self.config.temperature
        own, other = ((one.float() / heat).log_softmax(-1) for one in (students_logits, logits))
        parts["logits"] = heat**2 * F.kl_div(own, other, reduction="none", log_target=True).sum(-1)
        return {**parts, "predicted": students_logits.argmax(-1), "teacher_predicted": logits.argmax(-1)}

    def teachers_view(self, images: Tensor) -> Tensor:
        """The images at the teacher's size."""
        size = tuple(self.teacher.patch_embed.img_size)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images.float(), size=size, mode="bilinear", antialias=True).to(images.dtype)

    def enlarged(self, tokens: Tensor) -> Tensor:
        """The teacher's tokens ``[B, K + N, D]`` on the student's map; class and register tokens stay as they are."""
        own, other = (tuple(one.patch_embed.grid_size) for one in (self.student, self.teacher))
        if own == other:
            return tokens
        count = self.teacher.num_prefix_tokens
        maps = tokens[:, count:].transpose(1, 2).unflatten(2, other).float()  # [B, D, h, w]
        maps = F.interpolate(maps, size=own, mode="bilinear").flatten(2).transpose(1, 2)  # [B, H W, D]
        return torch.cat((tokens[:, :count], maps.to(tokens.dtype)), dim=1)
