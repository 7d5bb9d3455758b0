"""``gspn::line_scan`` and ``gspn::line_scan_backward``: schemas, shapes without data, derivatives of every order, vmap.

Derivatives. With ``A`` the scan's linear map, ``h = A(taps) (lam x)``, the adjoint state is ``g = A^T grad`` and

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
from .transforms import fold, transformed

_SCAN = "gspn::line_scan"
_BACKWARD = "gspn::line_scan_backward"

torch.library.define(_SCAN, "(Tensor x, Tensor taps, Tensor? lam, str direction, SymInt? segment, str impl) -> Tensor")
torch.library.define(
    _BACKWARD,
    "(Tensor grad, Tensor h, Tensor? x, Tensor taps, Tensor? lam, str direction, SymInt? segment, str impl, "
    "bool need_taps, bool need_lam) -> (Tensor dx, Tensor dtaps, Tensor dlam)",
)


# --- What runs --------------------------------------------------------------------------------------------------------


@torch.library.impl(_SCAN, "CompositeExplicitAutograd")
def _scan_impl(x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None, impl: str) -> Tensor:
    return resolve(impl, x, "line_scan").line_scan(x, taps, lam, direction, segment)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward_impl(
    grad: Tensor,
    h: Tensor,
    x: Tensor | None,
    taps: Tensor,
    lam: Tensor | None,
    direction: str,
    segment: int | None,
    impl: str,
    need_taps: bool,
    need_lam: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dtaps, dlam = resolve(impl, h, "line_scan").line_scan_backward(
        grad, h, x, taps, lam, direction, segment, need_taps, need_lam
    )
    # An operator cannot return None: what nobody asked for is an empty tensor.
    return dx, h.new_empty(0) if dtaps is None else dtaps, h.new_empty(0) if dlam is None else dlam


@torch.library.register_fake(_SCAN)
def _scan_fake(x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None, impl: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    grad: Tensor,
    h: Tensor,
    x: Tensor | None,
    taps: Tensor,
    lam: Tensor | None,
    direction: str,
    segment: int | None,
    impl: str,
    need_taps: bool,
    need_lam: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(h if x is None else x),
        torch.empty_like(taps) if need_taps else h.new_empty(0),
        torch.empty_like(lam) if need_lam and lam is not None else h.new_empty(0),
    )


# --- First derivatives ------------------------------------------------------------------------------------------------


def _scan_setup(ctx, inputs, output) -> None:
    x, taps, lam, direction, segment, impl = inputs
    need_x, need_taps, need_lam = (
        bool(t is not None and needs) for t, needs in zip((x, taps, lam), ctx.needs_input_grad[:3], strict=True)
    )
    # Keep only what the gradients asked for will read: x enters dlam alone.
    ctx.save_for_backward(x if need_lam else None, taps, lam, output)
    ctx.need_taps, ctx.need_lam, ctx.need_x = need_taps, need_lam, need_x
    ctx.direction, ctx.segment, ctx.impl = direction, segment, impl


def _scan_grad(ctx, grad: Tensor):
    x, taps, lam, h = ctx.saved_tensors
    dx, dtaps, dlam = apply_line_scan_backward(
        grad, h, x, taps, lam, ctx.direction, ctx.segment, ctx.impl, ctx.need_taps, ctx.need_lam
    )
    return (
        dx if ctx.need_x else None,
        dtaps if ctx.need_taps else None,
        dlam if ctx.need_lam else None,
        None,
        None,
        None,
    )


torch.library.register_autograd(_SCAN, _scan_grad, setup_context=_scan_setup)


# --- Second and further derivatives -----------------------------------------------------------------------------------


def _shifted(map_: Tensor, axis: int, by: int) -> Tensor:
    """``out[i] = map_[i - by]`` along ``axis`` (-1 or -2), 0 where that does not exist; ``by`` is -1, 0 or 1."""
    if by == 0:
        return map_
    size = map_.shape[axis]
    kept = map_.narrow(axis, 0, size - 1) if by > 0 else map_.narrow(axis, 1, size - 1)
    edge = (1, 0) if by > 0 else (0, 1)
    return pad(kept, edge if axis == -1 else (0, 0, *edge))


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
    here = before + here + after
    return _shifted(here, axes.line, 1 if axes.reverse else -1)


def _per_channel(taps: Tensor, channels: int) -> Tensor:
    """``[B, G, 3, H, W]`` to ``[B, C, 3, H, W]``, each group's taps repeated for its channels."""
    return taps.repeat_interleave(channels // taps.shape[1], dim=1)


def _backward_setup(ctx, inputs, output) -> None:
    grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam = inputs
    ctx.save_for_backward(grad, h, x, taps, lam)
    ctx.direction, ctx.segment, ctx.impl, ctx.need_taps, ctx.need_lam = direction, segment, impl, need_taps, need_lam


def _backward_grad(ctx, a: Tensor, b: Tensor, c: Tensor):
    grad, h, x, taps, lam = ctx.saved_tensors
    direction, segment, impl = ctx.direction, ctx.segment, ctx.impl
    channels = h.shape[1]

    r = a if lam is None else lam * a
    if ctx.need_lam:
        r = r + x * c
    if ctx.need_taps:
        r = r + (_per_channel(b, channels) * _previous_states(h, direction, segment)).sum(2)
    v = apply_line_scan(r.to(h.dtype), taps, None, direction, segment, impl)
    g, d_taps, _ = apply_line_scan_backward(grad, v, None, taps, None, direction, segment, impl, True, False)

    d_h = d_x = d_lam = None
    if ctx.need_taps:
        d_h = _to_previous_states(_per_channel(b, channels) * g.unsqueeze(2), direction, segment)
    if ctx.need_lam:
        d_x = c * g
    if lam is not None:
        d_lam = a * g
    return v, d_h, d_x, d_taps, d_lam, None, None, None, None, None


torch.library.register_autograd(_BACKWARD, _backward_grad, setup_context=_backward_setup)


# --- vmap -------------------------------------------------------------------------------------------------------------


@torch.library.register_vmap(_SCAN)  # pyright: ignore[reportOptionalCall]
def _scan_vmap(info, in_dims, x, taps, lam, direction, segment, impl):
    x, taps, lam = fold((x, taps, lam), in_dims[:3], info.batch_size)
    h = torch.ops.gspn.line_scan(x, taps, lam, direction, segment, impl)
    return h.unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap(_BACKWARD)  # pyright: ignore[reportOptionalCall]
def _backward_vmap(info, in_dims, grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam):
    tensors = fold((grad, h, x, taps, lam), in_dims[:5], info.batch_size)
    grads = torch.ops.gspn.line_scan_backward(*tensors, direction, segment, impl, need_taps, need_lam)
    wanted = (True, need_taps, need_lam)
    return tuple(
        # What nobody asked for has no batch to unfold.
        g.unflatten(0, (info.batch_size, -1)) if want else g.expand(info.batch_size, 0)
        for g, want in zip(grads, wanted, strict=True)
    ), (0, 0, 0)


# --- torch.func: see transforms.py ------------------------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_scan_setup)
    backward = staticmethod(_scan_grad)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def forward(x, taps, lam, direction, segment, impl):
        return torch.ops.gspn.line_scan(x, taps, lam, direction, segment, impl)


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_backward_setup)
    backward = staticmethod(_backward_grad)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def forward(grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam):
        return torch.ops.gspn.line_scan_backward(grad, h, x, taps, lam, direction, segment, impl, need_taps, need_lam)


def apply_line_scan(*args) -> Tensor:
    """``torch.ops.gspn.line_scan``, also under the transforms of torch.func."""
    return _Scan.apply(*args) if transformed() else torch.ops.gspn.line_scan(*args)  # type: ignore[return-value]


def apply_line_scan_backward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.gspn.line_scan_backward``, also under the transforms of torch.func."""
    return _Backward.apply(*args) if transformed() else torch.ops.gspn.line_scan_backward(*args)  # type: ignore[return-value]
