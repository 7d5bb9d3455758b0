"""``gspn::line_scan`` and ``gspn::line_scan_backward``, with derivatives of every order.

With ``A`` the scan's linear map, ``h = A(taps) (lam x)``, the adjoint state is ``g = A^T grad`` and

    dx = lam g,    dlam = x g,    dtaps[k, i, j] = sum_group g[i, j] h[i-1, j+k-1].

``line_scan_backward`` computes all of it in one sweep. It is an operator with a derivative of its own: for cotangents
``a, b, c`` of ``dx, dtaps, dlam`` the cotangent of ``g`` is ``r = lam a + x c + sum_k b_k h[i-1, j+k-1]``; then
``v = A r`` is the gradient of ``grad``, the gradient of ``taps`` has the form of ``dtaps`` with ``v`` in the place of
``h``, and ``h``, ``x``, ``lam`` enter linearly. All of it is expressed by these two operators again, so derivatives of
any order exist and run in the fast kernels.

Forward mode needs no more. The tangent of a scan is a scan,

    dh = A (dlam x + lam dx + sum_k dtaps_k h[i-1, j+k-1]),

and so is that of the adjoint state, with the products ``dtaps_k g`` sent to the states that the taps weigh.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..directions import scan_axes
from ..implementations import check_impl, resolve
from ..valid_size import check_valid_size, within
from ..validation import check_line_scan
from .operator import fold, register

# --- line_scan --------------------------------------------------------------------------------------------------------


def _check(x, taps, lam, direction, segment, impl, valid_size, has_data=False) -> None:
    check_impl(impl)
    check_line_scan(("x", x), taps, lam, direction, segment, has_data)
    check_valid_size(x, valid_size, has_data)


def _run(x, taps, lam, direction, segment, impl, valid_size) -> Tensor:
    _check(x, taps, lam, direction, segment, impl, valid_size, has_data=True)
    return resolve(impl, x, "line_scan").line_scan(x, taps, lam, direction, segment, valid_size)


def _fake(x: Tensor, *others) -> Tensor:
    _check(x, *others)
    return torch.empty_like(x)


def _save(ctx, inputs, output) -> None:
    x, taps, lam, ctx.direction, ctx.segment, ctx.impl, valid_size = inputs
    ctx.need_x, ctx.need_taps, ctx.need_lam = (
        t is not None and bool(needs) for t, needs in zip((x, taps, lam), ctx.needs_input_grad[:3], strict=True)
    )
    # Keep only what the gradients asked for will read: x enters dlam alone.
    ctx.save_for_backward(x if ctx.need_lam else None, taps, lam, output, valid_size)


def _differentiate(ctx, grad: Tensor):
    x, taps, lam, h, valid_size = ctx.saved_tensors
    grads = apply_line_scan_backward(
        grad, h, x, taps, lam, ctx.direction, ctx.segment, ctx.impl, ctx.need_taps, ctx.need_lam, valid_size
    )
    needed = (ctx.need_x, ctx.need_taps, ctx.need_lam)
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), *(None,) * 4)


def _tangent(inputs, output, dx: Tensor, dtaps: Tensor, dlam: Tensor | None, *_):
    x, taps, lam, direction, segment, impl, valid_size = inputs
    source = dx if lam is None or dlam is None else lam * dx + dlam * x
    source = source + (_of_channels(dtaps, x) * _previous_states(output[0], direction, segment, valid_size)).sum(2)
    return apply_line_scan(source.to(x.dtype), taps, None, direction, segment, impl, valid_size)


def _vmap(call, info, in_dims, x, taps, lam, direction, segment, impl, valid_size):
    *maps, sizes = fold((x, taps, lam, valid_size), (*in_dims[:3], in_dims[-1]), info.batch_size)
    h = call(*maps, direction, segment, impl, sizes)
    return h.unflatten(0, (info.batch_size, -1)), 0


apply_line_scan = register(
    "line_scan",
    "(Tensor x, Tensor taps, Tensor? lam, str direction, SymInt? segment, str impl, Tensor? valid_size=None) -> Tensor",
    run=_run, fake=_fake, save=_save, differentiate=_differentiate, vmap=_vmap, tangent=_tangent,
)  # fmt: skip


# --- line_scan_backward -----------------------------------------------------------------------------------------------


def _check_backward(grad, h, x, taps, lam, direction, segment, impl, need_lam, valid_size, has_data=False) -> None:
    check_impl(impl)
    check_line_scan(("grad", grad), taps, lam, direction, segment, has_data, h=h, x=x)
    check_valid_size(grad, valid_size, has_data)
    if need_lam and (x is None or lam is None):
        raise ValueError(
            f"{need_lam=} but {'x' if x is None else 'lam'} is None; pass both x and lam, or need_lam=False."
        )


def _run_backward(grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam, valid_size):
    _check_backward(grad, h, x, taps, lam, direction, segment, impl, need_lam, valid_size, has_data=True)
    dx, dtaps, dlam = resolve(impl, h, "line_scan").line_scan_backward(
        grad, h, x, taps, lam, direction, segment, need_taps, need_lam, valid_size
    )
    # An operator cannot return None: a gradient that was not requested is an empty tensor.
    return dx, h.new_empty(0) if dtaps is None else dtaps, h.new_empty(0) if dlam is None else dlam


def _fake_backward(grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam, valid_size):
    _check_backward(grad, h, x, taps, lam, direction, segment, impl, need_lam, valid_size)
    return (
        torch.empty_like(h if x is None else x),
        torch.empty_like(taps) if need_taps else h.new_empty(0),
        torch.empty_like(lam) if need_lam and lam is not None else h.new_empty(0),
    )


def _of_channels(taps: Tensor, like: Tensor) -> Tensor:
    """``[B, G, 3, H, W]`` to ``[B, C, 3, H, W]``, for the channels of ``like``."""
    return taps.repeat_interleave(like.shape[1] // taps.shape[1], dim=1)


def _shifted(map_: Tensor, axis: int, by: int) -> Tensor:
    """``out[i] = map_[i - by]`` along ``axis`` (-1 or -2), 0 where that does not exist; ``by`` is -1, 0 or 1."""
    edge = (by, -by)  # a negative width crops
    return pad(map_, edge if axis == -1 else (0, 0, *edge)) if by and map_.shape[axis] else map_


def _has_previous(map_: Tensor, direction: str, segment: int | None, valid_size: Tensor | None) -> Tensor:
    """True on an image's lines that are scanned after another one of their segment; in the padding it may be anything.

    Broadcasts over ``[B, C, 3, H, W]``.
    """
    axes = scan_axes(direction)
    count = map_.shape[axes.line]
    step = torch.arange(count, device=map_.device)
    if axes.reverse:
        own = count if valid_size is None else valid_size[:, axes.line].view(-1, 1, 1, 1)
        step = own - 1 - step
    has = step > 0 if segment is None else step.remainder(segment) != 0  # [lines] or [B, 1, 1, lines]
    return has.unsqueeze(-2 if axes.line == -1 else -1)


def _previous_states(h: Tensor, direction: str, segment: int | None, valid_size: Tensor | None) -> Tensor:
    """``[B, C, 3, H, W]``: for each pixel the three states its taps weigh, 0 where there is none."""
    axes = scan_axes(direction)
    h = within(h, valid_size)
    before = _shifted(h, axes.line, -1 if axes.reverse else 1)
    three = torch.stack([_shifted(before, axes.cross, 1 - k) for k in range(3)], dim=2)
    return torch.where(_has_previous(h, direction, segment, valid_size), three, 0)


def _to_previous_states(products: Tensor, direction: str, segment: int | None, valid_size: Tensor | None) -> Tensor:
    """The transpose of :func:`_previous_states`, ``[B, C, 3, H, W]`` to ``[B, C, H, W]``."""
    axes = scan_axes(direction)
    products = within(products, valid_size)
    products = torch.where(_has_previous(products, direction, segment, valid_size), products, 0)
    before, here, after = (_shifted(products[:, :, k], axes.cross, k - 1) for k in range(3))
    return within(_shifted(before + here + after, axes.line, 1 if axes.reverse else -1), valid_size)


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.direction, ctx.segment, ctx.impl, ctx.need_taps, ctx.need_lam, valid_size = inputs
    ctx.save_for_backward(*tensors, valid_size)


def _differentiate_backward(ctx, a: Tensor, b: Tensor, c: Tensor):
    grad, h, x, taps, lam, valid_size = ctx.saved_tensors
    direction, segment, impl = ctx.direction, ctx.segment, ctx.impl

    r = a if lam is None else lam * a
    if ctx.need_lam:
        r = r + x * c
    if ctx.need_taps:
        b = _of_channels(b, h)
        r = r + (b * _previous_states(h, direction, segment, valid_size)).sum(2)
    v = apply_line_scan(r.to(h.dtype), taps, None, direction, segment, impl, valid_size)
    g, d_taps, _ = apply_line_scan_backward(
        grad, v, None, taps, None, direction, segment, impl, True, False, valid_size
    )
    return (
        v,
        _to_previous_states(b * g.unsqueeze(2), direction, segment, valid_size) if ctx.need_taps else None,
        within(c * g, valid_size) if ctx.need_lam else None,
        d_taps,
        None if lam is None else within(a * g, valid_size),
        *(None,) * 6,
    )


def _tangent_backward(inputs, output, d_grad: Tensor, d_h: Tensor, d_x, d_taps: Tensor, d_lam, *_):
    grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam, valid_size = inputs
    # The adjoint state g, its tangent, and the two parts of the tangent of dtaps = sum_group g h[i-1, j+k-1].
    how = direction, segment, impl, need_taps, False, valid_size
    g, of_states, _ = apply_line_scan_backward(grad, d_h, None, taps, None, *how)
    sent = _to_previous_states(_of_channels(d_taps, h) * g.unsqueeze(2), direction, segment, valid_size)
    d_g, of_adjoint, _ = apply_line_scan_backward((d_grad + sent).to(h.dtype), h, None, taps, None, *how)
    return (
        d_g if lam is None else within(lam * d_g + d_lam * g, valid_size),
        of_states + of_adjoint,
        within(x * d_g + d_x * g, valid_size) if need_lam else torch.zeros_like(output[2]),
    )


def _vmap_backward(
    call, info, in_dims, grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam, valid_size
):  # fmt: skip
    *tensors, sizes = fold((grad, h, x, taps, lam, valid_size), (*in_dims[:5], in_dims[-1]), info.batch_size)
    grads = call(*tensors, direction, segment, impl, need_taps, need_lam, sizes)
    return tuple(
        # A gradient that was not requested has no batch to unfold.
        g.unflatten(0, (info.batch_size, -1)) if need else g.expand(info.batch_size, 0)
        for g, need in zip(grads, (True, need_taps, need_lam), strict=True)
    ), (0, 0, 0)


apply_line_scan_backward = register(
    "line_scan_backward",
    "(Tensor grad, Tensor h, Tensor? x, Tensor taps, Tensor? lam, str direction, SymInt? segment, str impl, "
    "bool need_taps, bool need_lam, Tensor? valid_size=None) -> (Tensor dx, Tensor dtaps, Tensor dlam)",
    run=_run_backward, fake=_fake_backward, save=_save_backward,
    differentiate=_differentiate_backward, vmap=_vmap_backward, tangent=_tangent_backward,
)  # fmt: skip
