"""``line_scan`` and its gradients, line by line.

Products with neighbours that do not exist are left out rather than multiplied by zero, so a NaN in a tap that reaches
outside the image, or before the first line, touches nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..directions import scan_axes
from ..validation import state_dtype
from .images import each_image, put_together


def _grouped_lines(map_: Tensor, groups: int, line: int) -> Tensor:
    """``[B, C, H, W]`` to ``[lines, B, G, C/G, cross]`` in the state's dtype."""
    grouped = map_.to(state_dtype(map_.dtype)).unflatten(1, (groups, map_.shape[1] // groups))
    return grouped.movedim(line, 0)


def _from_lines(lines: list[Tensor], like: Tensor, line: int) -> Tensor:
    """The inverse of :func:`_grouped_lines`, in ``like``'s dtype and memory layout."""
    stacked = torch.stack(lines, dim=0).movedim(0, line).flatten(1, 2)
    return torch.empty_like(like).copy_(stacked)


def _from_previous(taps: Tensor, state: Tensor) -> Tensor:
    """``sum_k taps[k, j] state[j+k-1]`` over neighbours that exist; taps ``[3, B, G, 1, n]``, state ``[..., n]``."""
    before, here, after = taps
    return here * state + pad(before[..., 1:] * state[..., :-1], (1, 0)) + pad(after[..., :-1] * state[..., 1:], (0, 1))


def _to_previous(taps: Tensor, grad: Tensor) -> Tensor:
    """The transpose of :func:`_from_previous`: what a line's gradient sends to the line before it."""
    before, here, after = taps
    return here * grad + pad(before[..., 1:] * grad[..., 1:], (0, 1)) + pad(after[..., :-1] * grad[..., :-1], (1, 0))


def _tap_grads(grad: Tensor, state: Tensor) -> Tensor:
    """``[3, B, G, n]``: each tap's gradient, the channels of a group summed."""
    before = pad((grad[..., 1:] * state[..., :-1]).sum(-2), (1, 0))
    after = pad((grad[..., :-1] * state[..., 1:]).sum(-2), (0, 1))
    return torch.stack([before, (grad * state).sum(-2), after])


def line_scan(
    x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None, valid_size: Tensor | None = None
) -> Tensor:
    """``h_i = lam_i x_i + w_i h_{i-1}``, line by line; see :func:`gspn.line_scan`."""
    if valid_size is not None:
        how: Any = direction, segment
        return put_together([line_scan(*own, *how) for own in each_image(valid_size, x, taps, lam)], x)
    axes = scan_axes(direction)
    groups = taps.shape[1]
    if x.numel() == 0:
        return torch.empty_like(x)
    acc = state_dtype(x.dtype)
    x_lines = _grouped_lines(x, groups, axes.line)  # [L, B, G, C/G, n]
    if lam is not None:
        x_lines = x_lines * _grouped_lines(lam, groups, axes.line)
    tap_lines = taps.to(acc).movedim(axes.line, 0).movedim(3, 1).unsqueeze(4)  # [L, 3, B, G, 1, n]

    count = x_lines.shape[0]
    order = range(count - 1, -1, -1) if axes.reverse else range(count)
    lines: list[Tensor] = [x_lines[0]] * count
    state = None
    for step, i in enumerate(order):
        restart = step == 0 if segment is None else step % segment == 0
        state = x_lines[i] if restart or state is None else x_lines[i] + _from_previous(tap_lines[i], state)
        lines[i] = state
    return _from_lines(lines, x, axes.line)


def line_scan_backward(
    grad: Tensor, h: Tensor, x: Tensor | None, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None,
    need_taps: bool, need_lam: bool, valid_size: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The adjoint scan: with ``g_i = grad_i + w_{i+1}^T g_{i+1}``, the gradients

    ``dx = lam g``, ``dlam = x g``, ``dtaps[k, i, j] = sum_group g[i, j] h[i-1, j+k-1]``.
    """
    if valid_size is not None:
        how: Any = direction, segment, need_taps, need_lam
        own = [line_scan_backward(*maps, *how) for maps in each_image(valid_size, grad, h, x, taps, lam)]
        dx, dtaps, dlam = ([grads[i] for grads in own] for i in range(3))
        return (
            put_together(dx, h if x is None else x),
            put_together(dtaps, taps) if need_taps else None,
            put_together(dlam, lam) if need_lam and lam is not None else None,
        )
    axes = scan_axes(direction)
    groups = taps.shape[1]
    if grad.numel() == 0:
        # A tap's gradient sums over the channels of its group: with no pixels there are no taps either.
        return (
            torch.empty_like(grad),
            torch.zeros_like(taps) if need_taps else None,
            torch.empty_like(grad if lam is None else lam) if need_lam else None,
        )
    acc = state_dtype(grad.dtype)
    grad_lines = _grouped_lines(grad, groups, axes.line)
    h_lines = _grouped_lines(h, groups, axes.line)
    tap_lines = taps.to(acc).movedim(axes.line, 0).movedim(3, 1).unsqueeze(4)

    count = grad_lines.shape[0]
    order = list(range(count - 1, -1, -1) if axes.reverse else range(count))
    g_lines: list[Tensor] = [grad_lines[0]] * count
    dtap_lines: list[Tensor] = [tap_lines[0, :, :, :, 0]] * count
    carried = None
    for step in range(count - 1, -1, -1):
        i = order[step]
        g = grad_lines[i] if carried is None else grad_lines[i] + carried
        restart = step == 0 if segment is None else step % segment == 0
        g_lines[i] = g
        dtap_lines[i] = torch.zeros_like(dtap_lines[i]) if restart else _tap_grads(g, h_lines[order[step - 1]])
        carried = None if restart else _to_previous(tap_lines[i], g)

    def with_factor(factor: Tensor | None) -> list[Tensor]:
        if factor is None:
            return g_lines
        factor_lines = _grouped_lines(factor, groups, axes.line)
        return [g * f for g, f in zip(g_lines, factor_lines, strict=True)]

    dx = _from_lines(with_factor(lam), grad if x is None else x, axes.line)
    dtaps = None
    if need_taps:
        stacked = torch.stack(dtap_lines, dim=0).movedim(1, 3).movedim(0, axes.line)  # [B, G, 3, H, W]
        dtaps = torch.empty_like(taps).copy_(stacked)
    dlam = _from_lines(with_factor(x), lam, axes.line) if need_lam and lam is not None else None
    return dx, dtaps, dlam
