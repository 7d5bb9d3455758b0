"""The specification: every operator in plain PyTorch, for any device and any floating-point dtype.

Nothing here is fast. Each function says in the fewest possible words what its operator computes, and every other
implementation is tested against it. Products with neighbours that do not exist are left out rather than multiplied by
zero, so a NaN in a tap that reaches outside the image, or before the first line, touches nothing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from .directions import scan_axes
from .projections import project, project_taps
from .stochastic_taps import stochastic_taps
from .unfused import compose


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a scan over ``dtype`` accumulates: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    return torch.stack(
        [
            pad((grad[..., 1:] * state[..., :-1]).sum(-2), (1, 0)),
            (grad * state).sum(-2),
            pad((grad[..., :-1] * state[..., 1:]).sum(-2), (0, 1)),
        ]
    )


def line_scan(x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None) -> Tensor:
    """``h_i = lam_i x_i + w_i h_{i-1}``, line by line; see :func:`gspn.line_scan`."""
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
    grad: Tensor,
    h: Tensor,
    x: Tensor | None,
    taps: Tensor,
    lam: Tensor | None,
    direction: str,
    segment: int | None,
    need_taps: bool,
    need_lam: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The adjoint scan: with ``g_i = grad_i + w_{i+1}^T g_{i+1}``, the gradients

    ``dx = lam g``, ``dlam = x g``, ``dtaps[k, i, j] = sum_group g[i, j] h[i-1, j+k-1]``.
    """
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
        dtap_lines[i] = (
            torch.zeros_like(tap_lines[i, :, :, :, 0]) if restart else _tap_grads(g, h_lines[order[step - 1]])
        )
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


def propagate(
    x: Tensor,
    proxy: Tensor,
    tap_proj: Tensor,
    lam_proj: Tensor,
    u_proj: Tensor,
    skip_proj: Tensor | None,
    directions: tuple[str, ...],
    segment: int | None,
) -> Tensor:
    """The composition of ``stochastic_taps`` and ``line_scan``; see :func:`gspn.propagate`."""
    y = compose(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, line_scan)
    return torch.empty_like(x).copy_(y)


def propagate_backward(
    grad: Tensor,
    x: Tensor,
    proxy: Tensor,
    tap_proj: Tensor,
    lam_proj: Tensor,
    u_proj: Tensor,
    skip_proj: Tensor | None,
    directions: tuple[str, ...],
    segment: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the composition, each map's in turn; with ``w = stochastic_taps(a)`` those of the logits are

    ``da_k = sigmoid(-a_k) w_k (dw_k - sum_j w_j dw_j)``,

    and a map ``P p`` gives ``P^T d`` to the proxy and the sum over pixels of ``d p^T`` to its projection.
    """
    dtype = x.dtype
    dx, dproxy = torch.zeros_like(x), torch.zeros_like(proxy)
    dtap, dlam, du = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (tap_proj, lam_proj, u_proj))

    def add_to_proxy(map_grad: Tensor, weight: Tensor) -> Tensor:
        """Adds ``P^T d`` to the proxy's gradient and returns that of ``P``."""
        dproxy.add_(torch.einsum("bchw,cs->bshw", map_grad, weight))
        return torch.einsum("bchw,bshw->cs", map_grad, proxy)

    dskip = None
    if skip_proj is not None:
        weight = skip_proj.to(dtype)
        dx += project(proxy, weight) * grad
        dskip = add_to_proxy(x * grad, weight).to(skip_proj.dtype)
    for d, direction in enumerate(directions):
        tap_weight, lam_weight, u_weight = (p[d].to(dtype) for p in (tap_proj, lam_proj, u_proj))
        logits = project_taps(proxy, tap_weight)
        taps = stochastic_taps(logits, direction=direction)  # type: ignore[arg-type]
        lam = project(proxy, lam_weight)
        h = line_scan(x, taps, lam, direction, segment)
        dx_d, dtaps, dlam_map = line_scan_backward(
            grad * project(proxy, u_weight), h, x, taps, lam, direction, segment, True, True
        )
        dx += dx_d
        du[d] = add_to_proxy(grad * h, u_weight)
        dlam[d] = add_to_proxy(cast("Tensor", dlam_map), lam_weight)
        dtaps = cast("Tensor", dtaps)
        mean = (taps * dtaps).sum(2, keepdim=True)
        dlogits = torch.sigmoid(-logits) * taps * (dtaps - mean)  # [B, G, 3, H, W]
        dtap[d] = add_to_proxy(dlogits.flatten(1, 2), tap_weight.flatten(0, 1)).view_as(tap_weight)
    return dx, dproxy, dtap, dlam, du, dskip
