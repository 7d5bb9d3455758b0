"""``gspn::line_scan`` and ``gspn::line_scan_backward``, with derivatives of every order.

With ``A`` the scan's linear map, ``h = A(taps) (lam x)``, the adjoint state is ``g = A^T grad`` and

    dx = lam g,    dlam = x g,    dtaps[k, i, j] = sum_group g[i, j] h[i-1, j+k-1].

``line_scan_backward`` computes all of it in one sweep. It is an operator with a derivative of its own: for cotangents
``a, b, c`` of ``dx, dtaps, dlam`` the cotangent of ``g`` is ``r = lam a + x c + sum_k b_k h[i-1, j+k-1]``; then
``v = A r`` is the gradient of ``grad``, the gradient of ``taps`` has the form of ``dtaps`` with ``v`` in the place of
``h``, and ``h``, ``x``, ``lam`` enter linearly. All of it is expressed by these two operators again, so derivatives of
any order exist and run in the fast kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..directions import scan_axes
from ..implementations import resolve
from .operator import fold, register

# --- line_scan --------------------------------------------------------------------------------------------------------


def _run(x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None, impl: str) -> Tensor:
    return resolve(impl, x, "line_scan").line_scan(x, taps, lam, direction, segment)


def _save(ctx, inputs, output) -> None:
    x, taps, lam, ctx.direction, ctx.segment, ctx.impl = inputs
    ctx.need_x, ctx.need_taps, ctx.need_lam = (
        t is not None and bool(needs) for t, needs in zip((x, taps, lam), ctx.needs_input_grad[:3], strict=True)
    )
    # Keep only what the gradients asked for will read: x enters dlam alone.
    ctx.save_for_backward(x if ctx.need_lam else None, taps, lam, output)


def _differentiate(ctx, grad: Tensor):
    x, taps, lam, h = ctx.saved_tensors
    grads = apply_line_scan_backward(
        grad, h, x, taps, lam, ctx.direction, ctx.segment, ctx.impl, ctx.need_taps, ctx.need_lam
    )
    needed = (ctx.need_x, ctx.need_taps, ctx.need_lam)
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None)


def _vmap(info, in_dims, x, taps, lam, *rest):
    h = torch.ops.gspn.line_scan(*fold((x, taps, lam), in_dims[:3], info.batch_size), *rest)
    return h.unflatten(0, (info.batch_size, -1)), 0


apply_line_scan = register(
    "line_scan",
    "(Tensor x, Tensor taps, Tensor? lam, str direction, SymInt? segment, str impl) -> Tensor",
    run=_run, fake=lambda x, *_: torch.empty_like(x), save=_save, differentiate=_differentiate, vmap=_vmap,
)  # fmt: skip


# --- line_scan_backward -----------------------------------------------------------------------------------------------


def _run_backward(
    grad: Tensor, h: Tensor, x: Tensor | None, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None,
    impl: str, need_taps: bool, need_lam: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dtaps, dlam = resolve(impl, h, "line_scan").line_scan_backward(
        grad, h, x, taps, lam, direction, segment, need_taps, need_lam
    )
    # An operator cannot return None: a gradient that was not requested is an empty tensor.
    return dx, h.new_empty(0) if dtaps is None else dtaps, h.new_empty(0) if dlam is None else dlam


def _fake_backward(grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam):
    return (
        torch.empty_like(h if x is None else x),
        torch.empty_like(taps) if need_taps else h.new_empty(0),
        torch.empty_like(lam) if need_lam and lam is not None else h.new_empty(0),
    )


def _shifted(map_: Tensor, axis: int, by: int) -> Tensor:
    """``out[i] = map_[i - by]`` along ``axis`` (-1 or -2), 0 where that does not exist; ``by`` is -1, 0 or 1."""
    edge = (by, -by)  # a negative width crops
    return pad(map_, edge if axis == -1 else (0, 0, *edge)) if by else map_


def _has_previous(map_: Tensor, direction: str, segment: int | None) -> Tensor:
    """True on lines that are scanned after another one of their segment; broadcasts over ``[..., H, W]``."""
    axes = scan_axes(direction)
    count = map_.shape[axes.line]
    step = torch.arange(count, device=map_.device)
    if axes.reverse:
        step = count - 1 - step
    has = step > 0 if segment is None else step.remainder(segment) != 0
    return has if axes.line == -1 else has.unsqueeze(-1)


def _previous_states(h: Tensor, direction: str, segment: int | None) -> Tensor:
    """``[B, C, 3, H, W]``: for each pixel the three states its taps weigh, 0 where there is none."""
    axes = scan_axes(direction)
    before = _shifted(h, axes.line, -1 if axes.reverse else 1)
    three = torch.stack([_shifted(before, axes.cross, 1 - k) for k in range(3)], dim=2)
    return torch.where(_has_previous(h, direction, segment), three, 0)


def _to_previous_states(products: Tensor, direction: str, segment: int | None) -> Tensor:
    """The transpose of :func:`_previous_states`, ``[B, C, 3, H, W]`` to ``[B, C, H, W]``."""
    axes = scan_axes(direction)
    products = torch.where(_has_previous(products, direction, segment), products, 0)
    before, here, after = (_shifted(products[:, :, k], axes.cross, k - 1) for k in range(3))
    return _shifted(before + here + after, axes.line, 1 if axes.reverse else -1)


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.direction, ctx.segment, ctx.impl, ctx.need_taps, ctx.need_lam = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx, a: Tensor, b: Tensor, c: Tensor):
    grad, h, x, taps, lam = ctx.saved_tensors
    direction, segment, impl = ctx.direction, ctx.segment, ctx.impl

    r = a if lam is None else lam * a
    if ctx.need_lam:
        r = r + x * c
    if ctx.need_taps:
        b = b.repeat_interleave(h.shape[1] // b.shape[1], dim=1)  # [B, C, 3, H, W]
        r = r + (b * _previous_states(h, direction, segment)).sum(2)
    v = apply_line_scan(r.to(h.dtype), taps, None, direction, segment, impl)
    g, d_taps, _ = apply_line_scan_backward(grad, v, None, taps, None, direction, segment, impl, True, False)
    return (
        v,
        _to_previous_states(b * g.unsqueeze(2), direction, segment) if ctx.need_taps else None,
        c * g if ctx.need_lam else None,
        d_taps,
        None if lam is None else a * g,
        *(None,) * 5,
    )


def _vmap_backward(info, in_dims, grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam):
    tensors = fold((grad, h, x, taps, lam), in_dims[:5], info.batch_size)
    grads = torch.ops.gspn.line_scan_backward(*tensors, direction, segment, impl, need_taps, need_lam)
    return tuple(
        # A gradient that was not requested has no batch to unfold.
        g.unflatten(0, (info.batch_size, -1)) if need else g.expand(info.batch_size, 0)
        for g, need in zip(grads, (True, need_taps, need_lam), strict=True)
    ), (0, 0, 0)


apply_line_scan_backward = register(
    "line_scan_backward",
    "(Tensor grad, Tensor h, Tensor? x, Tensor taps, Tensor? lam, str direction, SymInt? segment, str impl, "
    "bool need_taps, bool need_lam) -> (Tensor dx, Tensor dtaps, Tensor dlam)",
    run=_run_backward, fake=_fake_backward, save=_save_backward,
    differentiate=_differentiate_backward, vmap=_vmap_backward,
)  # fmt: skip
