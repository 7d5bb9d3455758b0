"""Initialization of an adapter: a latent space of what the attention writes, and constant gates fitted to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gspn.nn import CompactGSPN2d

from ..core import gate_fitting
from ..core.attention_matching import recorded
from .attention_matching import Distiller


@torch.no_grad()
def fit_gates(distiller: Distiller, batches: Iterable[Tensor]) -> dict[str, float]:
    r"""Initialize each mixer by what the attention that it replaces makes of some batches of images.

    With a latent space of L channels, ``up`` gets the L principal directions V of the attention's outputs before
    ``proj``, and ``down`` their transpose. Values v and outputs z are then fitted as :math:`V^T v` and :math:`V^T z`.
    The gates are those of :mod:`~gspn.tasks.core.gate_fitting`, from the tokens of the map alone; the fitted constants
    go through ``up`` and ``proj`` into the bias of the latter.

    The distiller's adapter is changed; it needs ``proxy_bias`` and copied projections. Returns by layer the share of
    the variance that the fit explains, of all channels.
    """
    batches = list(batches)
    mixers: dict[str, Any] = dict(distiller.adapter.mixers)
    second = {name: torch.zeros(mixer.dim, mixer.dim, dtype=torch.float64) for name, mixer in mixers.items()}
    mean, tokens = {name: torch.zeros(mixer.dim, dtype=torch.float64) for name, mixer in mixers.items()}, 0
    for name, _, target in _layers(distiller, batches):
        flat = target.flatten(0, 1).cpu().double()  # [B N, D]; on the CPU: Apple's GPU has no float64
        second[name] += flat.T @ flat
        mean[name] += flat.sum(0)
        tokens += len(flat) if name == next(iter(mixers)) else 0
    captured, sums = dict.fromkeys(mixers, 1.0), {name: {} for name in mixers}
    for name, mixer in mixers.items():
        if isinstance(mixer.scan, CompactGSPN2d):
            covariance = second[name] / tokens - torch.outer(mean[name], mean[name]) / tokens**2
            values, directions = torch.linalg.eigh(covariance)  # in ascending order
            directions = directions[:, -mixer.gspn.dim :]  # [D, L]
            captured[name] = (values[-mixer.gspn.dim :].sum() / values.sum().clamp(min=1e-30)).item()
            mixer.scan.up.weight.copy_(directions[:, :, None, None])
            mixer.scan.down.weight.copy_(directions.T[:, :, None, None])
        gate_fitting.make_constant(mixer.gspn)
    size = distiller.student.patch_embed.grid_size
    for name, values, target in _layers(distiller, batches):
        mixer = mixers[name]
        if isinstance(mixer.scan, CompactGSPN2d):
            down = mixer.scan.down.weight.flatten(1).T  # [D, L]
            values, target = values @ down, target @ down
        gate_fitting.add_batch(sums[name], mixer.gspn, values, size, target)
    explained = {}
    for name, mixer in mixers.items():
        linear = mixer.proj
        share, constant = gate_fitting.solve(mixer.gspn, sums[name], has_bias=linear.bias is not None)
        explained[name] = share * captured[name]
        if constant is not None:
            constant = constant.to(linear.weight)
            if isinstance(mixer.scan, CompactGSPN2d):
                constant = mixer.scan.up.weight.flatten(1) @ constant
            linear.bias += linear.weight @ constant
    return explained


def _layers(distiller: Distiller, batches: Iterable[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each batch and layer: its name, and the values and the attention's output before ``proj`` of the map's
    tokens, ``[B, H W, D]`` each.
    """
    attentions: dict[str, Any] = distiller.attentions()
    projections = {name: attention.proj for name, attention in attentions.items()}
    prefix = distiller.teacher.num_prefix_tokens
    for images in batches:
        with recorded(attentions) as whole, recorded(projections) as outputs:
            distiller.teacher.forward_features(distiller.teachers_view(images))
        for name, mixer in distiller.adapter.mixers.items():
            values = mixer.v(distiller.enlarged(whole[name][0]))
            yield name, values[:, prefix:], distiller.enlarged(outputs[name][0])[:, prefix:].to(values.dtype)
