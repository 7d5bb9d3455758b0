"""Initialization of an adapter: constant gates that approximate the attention's output by uniform scans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...core import gate_fitting
from ...core.attention_matching import recorded
from ..conditioning import Conditioning
from .attention_matching import Distiller


@torch.no_grad()
def fit_gates(distiller: Distiller, batches: Iterable[tuple[Tensor, Tensor, Conditioning]]) -> dict[str, float]:
    """Initialize each mixer with constant gates that are fitted to the attention that it replaces.

    The fit is that of :mod:`gspn.tasks.core.gate_fitting`. The fitted constants go through ``to_out`` into its bias.
    The distiller's adapter is changed; it needs ``proxy_bias`` and copied projections. Returns by layer the share of
    the variance that the fit explains.
    """
    mixers: dict[str, Any] = dict(distiller.adapter.mixers)
    for mixer in mixers.values():
        gate_fitting.make_constant(mixer.scan)
    sums: dict[str, gate_fitting.Sums] = {name: {} for name in mixers}
    before_out: dict[str, Any] = {name: module.to_out[0] for name, module in distiller.attentions().items()}  # type: ignore[index]
    for noisy, t, text in batches:
        arguments = distiller.arguments(noisy, text)
        with recorded(distiller.attentions()) as attentions, recorded(before_out) as outputs:
            distiller.teacher(noisy, t, **arguments, return_dict=False)
        sizes = distiller.map_sizes(noisy, t, arguments)
        for name, mixer in mixers.items():
            values = mixer.to_v(attentions[name][0])  # [B, N, D]
            gate_fitting.add_batch(sums[name], mixer.scan, values, sizes[name], outputs[name][0])
    explained = {}
    for name, mixer in mixers.items():
        linear = mixer.to_out[0]
        explained[name], constant = gate_fitting.solve(mixer.scan, sums[name], has_bias=linear.bias is not None)
        if constant is not None:
            linear.bias += linear.weight @ constant.to(linear.weight)
    return explained
