"""Initialization of an adapter: constant gates that approximate the attention's output by uniform scans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gspn.diffusers import GSPNTokenMixer

from ..conditioning import Conditioning
from .attention_matching import Distiller, recorded

# Scale of the gates' random parts relative to the constant ones.
_RANDOM = 0.1


@torch.no_grad()
def fit_gates(distiller: Distiller, batches: Iterable[tuple[Tensor, Tensor, Conditioning]]) -> dict[str, float]:
    r"""Initialize each mixer with constant gates, fitted by least squares to the attention that it replaces.

    The first channel of the proxy becomes the constant 1. With :math:`\lambda = 1` and taps that are nearly uniform,
    :math:`h_d` is a sum over the pixels before a pixel in direction d. For each channel c separately, over all tokens
    of the batches,

    .. math:: \min_{u, s, b} \sum \bigl( \textstyle\sum_d u_{dc} h_{dc} + s_c v_c + b_c - z_c \bigr)^2

    where v are the values, which attention and mixer share, and z is the attention's output before ``to_out``. The
    fitted u and s become the constant parts of the gates, and b goes through ``to_out`` into its bias. The parts that
    depend on the input start at random, at a tenth of that scale.

    The distiller's adapter is changed; it needs ``proxy_bias`` and copied projections. Returns by layer the share of
    the variance of z that the fit explains.
    """
    mixers = distiller.adapter.mixers
    for mixer in mixers.values():
        _make_constant(mixer)
    sums: dict[str, dict[str, Tensor]] = {}
    before_out: dict[str, Any] = {name: module.to_out[0] for name, module in distiller.attentions().items()}  # type: ignore[index]
    for noisy, t, text in batches:
        arguments = distiller.arguments(noisy, text)
        with recorded(distiller.attentions()) as attentions, recorded(before_out) as outputs:
            distiller.teacher(noisy, t, **arguments, return_dict=False)
        sizes = distiller.map_sizes(noisy, t, arguments)
        for name, mixer in mixers.items():
            regressors = _regressors(mixer, attentions[name][0], sizes[name])  # [B N, D, 4 + 1 + 1]
            _add(sums.setdefault(name, {}), regressors, outputs[name][0].flatten(0, 1))
    return {name: _solve(mixer, **sums[name]) for name, mixer in mixers.items()}


def _make_constant(mixer: GSPNTokenMixer) -> None:
    scan: Any = mixer.scan
    scan.proxy.weight[0].zero_()
    scan.proxy.bias.zero_()
    scan.proxy.bias[0] = 1
    scan.tap_proj[..., 0].zero_()  # logits of zero: a third of each neighbour
    scan.lam_proj *= _RANDOM
    scan.lam_proj[..., 0].fill_(1)
    scan.merge.fill_(1)


def _regressors(mixer: GSPNTokenMixer, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """For each token and channel: the four scans, the value if there is a skip, and 1; ``[B N, D, 5 or 6]``."""
    scan: Any = mixer.scan
    gates, skips = scan.u_proj.clone(), scan.skip_proj
    values = mixer.to_v(tokens)  # [B, N, D]
    maps = values.transpose(1, 2).unflatten(2, size)  # [B, D, H, W]
    columns = []
    kept = None if skips is None else skips.clone()
    if skips is not None:
        skips.zero_()
    for direction in range(len(gates)):
        scan.u_proj.zero_()
        scan.u_proj[direction, :, 0] = 1
        columns.append(scan(maps).flatten(2).transpose(1, 2))  # [B, N, D]
    scan.u_proj.copy_(gates)
    if skips is not None:
        skips.copy_(kept)
        columns.append(values)
    columns.append(torch.ones_like(values))
    return torch.stack(columns, dim=-1).flatten(0, 1)


def _add(sums: dict[str, Tensor], regressors: Tensor, target: Tensor) -> None:
    # On the CPU: Apple's GPU has no float64.
    regressors, target = regressors.cpu().double(), target.cpu().double()
    for name, value in (
        ("gram", torch.einsum("ndp,ndq->dpq", regressors, regressors)),  # [D, P, P]
        ("cross", torch.einsum("ndp,nd->dp", regressors, target)),  # [D, P]
        ("square", target.square().sum(0)),  # [D]
    ):
        sums[name] = sums[name] + value if name in sums else value


def _solve(mixer: GSPNTokenMixer, gram: Tensor, cross: Tensor, square: Tensor) -> float:
    scan: Any = mixer.scan
    directions, has_bias = len(scan.u_proj), mixer.to_out[0].bias is not None
    count, mean = gram[:, -1, -1], cross[:, -1]
    kept = slice(None) if has_bias else slice(None, -1)  # without a bias, nothing to fit there
    gram, cross = gram[:, kept, kept], cross[:, kept]
    # Scans of a constant map are multiples of each other: a small ridge selects the smallest solution.
    weight = 1e-6 * gram.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    solution = torch.linalg.solve(gram + weight.diag_embed(), cross)  # [D, P]
    gates = solution[:, :directions].T  # [4, D]
    scan.u_proj *= _RANDOM * gates.square().mean().sqrt().item()
    scan.u_proj[..., 0] = gates.to(scan.u_proj)
    if scan.skip_proj is not None:
        skips = solution[:, directions]
        scan.skip_proj *= _RANDOM * skips.square().mean().sqrt().item() / directions
        scan.skip_proj[..., 0] = skips.to(scan.skip_proj) / directions  # there is one for each direction
    if has_bias:
        linear: Any = mixer.to_out[0]
        linear.bias += linear.weight @ solution[:, -1].to(linear.weight)
    error = (square - 2 * (solution * cross).sum(1) + torch.einsum("dp,dpq,dq->d", solution, gram, solution)).sum()
    variance = (square - mean.square() / count).sum()
    return 1 - (error / variance.clamp(min=1e-30)).item()
