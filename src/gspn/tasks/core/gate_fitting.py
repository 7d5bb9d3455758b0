r"""Constant gates of a scan that approximate an attention by uniform scans, fitted by least squares.

The first channel of the proxy becomes the constant 1. With :math:`\lambda = 1` and taps that are nearly uniform,
:math:`h_d` is a sum over the pixels before a pixel in direction d. For each channel c separately, over all tokens of
some batches,

.. math:: \min_{u, s, b} \sum \bigl( \textstyle\sum_d u_{dc} h_{dc} + s_c v_c + b_c - z_c \bigr)^2

where v are the values, which attention and mixer share, and z is the attention's output before its projection. The
fitted u and s become the constant parts of the gates. The parts that depend on the input start at random, at a tenth of
that scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Scale of the gates' random parts relative to the constant ones.
_RANDOM = 0.1

Sums = dict[str, Tensor]
"""Sums over tokens that the fit needs: ``gram`` [D, P, P], ``cross`` [D, P] and ``square`` [D]."""


def make_constant(scan: Any) -> None:
    """Give a :class:`gspn.nn.GSPN2d` with ``proxy_bias`` a constant channel in its proxy, and uniform taps."""
    scan.proxy.weight[0].zero_()
    scan.proxy.bias.zero_()
    scan.proxy.bias[0] = 1
    scan.tap_proj[..., 0].zero_()  # logits of zero: a third of each neighbour
    scan.lam_proj *= _RANDOM
    scan.lam_proj[..., 0].fill_(1)
    scan.merge.fill_(1)


def add_batch(sums: Sums, scan: Any, values: Tensor, size: tuple[int, int], target: Tensor) -> None:
    """Add the tokens of a batch to the sums of a layer; values and target are ``[B, H W, D]``."""
    # On the CPU: Apple's GPU has no float64.
    regressors = _regressors(scan, values, size).cpu().double()  # [B N, D, P]
    target = target.flatten(0, 1).cpu().double()  # [B N, D]
    for name, value in (
        ("gram", torch.einsum("ndp,ndq->dpq", regressors, regressors)),  # [D, P, P]
        ("cross", torch.einsum("ndp,nd->dp", regressors, target)),  # [D, P]
        ("square", target.square().sum(0)),  # [D]
    ):
        sums[name] = sums[name] + value if name in sums else value


def _regressors(scan: Any, values: Tensor, size: tuple[int, int]) -> Tensor:
    """For each token and channel: the four scans, the value if there is a skip, and 1; ``[B N, D, 5 or 6]``."""
    gates, skips = scan.u_proj.clone(), scan.skip_proj
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


def solve(scan: Any, sums: Sums, *, has_bias: bool) -> tuple[float, Tensor | None]:
    """Set the gates of a scan to the solution.

    Args:
        scan: the :class:`gspn.nn.GSPN2d`, after :func:`make_constant`.
        sums: those of all batches.
        has_bias: whether what follows the scan can add a constant.

    Returns:
        The share of the variance of z that the fit explains; and b, ``[D]`` in float64, or None without ``has_bias``.
    """
    gram, cross, square = sums["gram"], sums["cross"], sums["square"]
    directions = len(scan.u_proj)
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
    error = (square - 2 * (solution * cross).sum(1) + torch.einsum("dp,dpq,dq->d", solution, gram, solution)).sum()
    variance = (square - mean.square() / count).sum()
    return 1 - (error / variance.clamp(min=1e-30)).item(), solution[:, -1] if has_bias else None
