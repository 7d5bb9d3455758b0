"""``gspn::propagate`` and ``gspn::propagate_backward``: schemas, shapes without data, derivatives, vmap.

The operator is registered with what is left when everything linear in small tensors has been done outside: the merge
folded into the projections, and the skips of all directions added up to one. Autograd differentiates that part itself.

Directions are named in one string, with commas: torch.jit's tracer has no lists of strings.

Nothing is kept for the backward but the arguments: it computes maps and states again. A second derivative goes through
the composition (:mod:`gspn.ops.unfused`), which has derivatives of every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..implementations import resolve
from ..unfused import compose
from .line_scan import apply_line_scan
from .transforms import fold, transformed

_FORWARD = "gspn::propagate"
_BACKWARD = "gspn::propagate_backward"
_PROJECTIONS = "Tensor tap_proj, Tensor lam_proj, Tensor u_proj, Tensor? skip_proj"

torch.library.define(
    _FORWARD, f"(Tensor x, Tensor proxy, {_PROJECTIONS}, str directions, SymInt? segment, str impl) -> Tensor"
)
torch.library.define(
    _BACKWARD,
    f"(Tensor grad, Tensor x, Tensor proxy, {_PROJECTIONS}, str directions, SymInt? segment, str impl) -> "
    "(Tensor dx, Tensor dproxy, Tensor dtap_proj, Tensor dlam_proj, Tensor du_proj, Tensor dskip_proj)",
)


# --- What runs --------------------------------------------------------------------------------------------------------


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _forward_impl(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl):
    module = resolve(impl, x, "propagate")
    return module.propagate(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, tuple(directions.split(",")), segment)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward_impl(grad, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl):
    module = resolve(impl, x, "propagate")
    *grads, dskip = module.propagate_backward(
        grad, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, tuple(directions.split(",")), segment
    )
    # An operator cannot return None: the gradient of a skip that is not there is an empty tensor.
    return (*grads, x.new_empty(0) if dskip is None else dskip)


@torch.library.register_fake(_FORWARD)
def _forward_fake(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl):
    return torch.empty_like(x)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(grad, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl):
    return (
        *(torch.empty_like(t) for t in (x, proxy)),
        *(t.new_empty(t.shape) for t in (tap_proj, lam_proj, u_proj)),
        x.new_empty(0) if skip_proj is None else skip_proj.new_empty(skip_proj.shape),
    )


# --- First derivatives ------------------------------------------------------------------------------------------------


def _forward_setup(ctx, inputs, output) -> None:
    *tensors, ctx.directions, ctx.segment, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _forward_grad(ctx, grad):
    tensors = ctx.saved_tensors  # once: under torch.utils.checkpoint a second look would be refused
    grads: list[Tensor | None] = list(apply_propagate_backward(grad, *tensors, ctx.directions, ctx.segment, ctx.impl))
    if tensors[-1] is None:
        grads[-1] = None
    wanted = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:6], strict=True)]
    return (*wanted, None, None, None)


torch.library.register_autograd(_FORWARD, _forward_grad, setup_context=_forward_setup)


# --- Second derivatives, through the composition ----------------------------------------------------------------------


def _backward_setup(ctx, inputs, output) -> None:
    *tensors, ctx.directions, ctx.segment, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward_grad(ctx, *cotangents):
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # As views: no argument is then a function of another, as a proxy is of x, and derivatives are partial ones.
        tensors: list[Any] = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        ]
        grad, *inputs = tensors
        x, proxy, tap_proj, lam_proj, u_proj, skip_proj = inputs
        y = compose(
            x, proxy, tap_proj, lam_proj, u_proj, skip_proj,
            ctx.directions.split(","), ctx.segment, lambda *scan: apply_line_scan(*scan, "auto"),
        )  # fmt: skip
        present = [t for t in inputs if t is not None]
        first = torch.autograd.grad(y, present, grad, create_graph=True)
        second = iter(
            torch.autograd.grad(
                first, [grad, *present], cotangents[: len(present)], create_graph=further, allow_unused=True
            )
        )
    return (*(None if t is None else next(second) for t in tensors), None, None, None)


torch.library.register_autograd(_BACKWARD, _backward_grad, setup_context=_backward_setup)


# --- vmap -------------------------------------------------------------------------------------------------------------


def _one_by_one(op, info, in_dims, tensors, rest):
    """A mapped projection is another operator for each entry."""
    return [
        op(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)), *rest)
        for i in range(info.batch_size)
    ]


@torch.library.register_vmap(_FORWARD)  # pyright: ignore[reportOptionalCall]
def _forward_vmap(info, in_dims, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, *rest):
    maps, projections = (x, proxy), (tap_proj, lam_proj, u_proj, skip_proj)
    if all(dim is None for dim in in_dims[2:6]):
        x, proxy = fold(maps, in_dims[:2], info.batch_size)
        y = torch.ops.gspn.propagate(x, proxy, *projections, *rest)
        return y.unflatten(0, (info.batch_size, -1)), 0
    op = torch.ops.gspn.propagate
    return torch.stack(_one_by_one(op, info, in_dims[:6], (*maps, *projections), rest)), 0


@torch.library.register_vmap(_BACKWARD)  # pyright: ignore[reportOptionalCall]
def _backward_vmap(info, in_dims, *arguments):
    # Every entry has projection gradients of its own, so nothing can be folded into the batch.
    tensors, rest = arguments[:7], arguments[7:]
    results = _one_by_one(torch.ops.gspn.propagate_backward, info, in_dims[:7], tensors, rest)
    return tuple(torch.stack(grads) for grads in zip(*results, strict=True)), (0,) * 6


# --- torch.func: see transforms.py ------------------------------------------------------------------------------------


class _Propagate(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_forward_setup)
    backward = staticmethod(_forward_grad)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def forward(*args):
        return torch.ops.gspn.propagate(*args)


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_backward_setup)
    backward = staticmethod(_backward_grad)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def forward(*args):
        return torch.ops.gspn.propagate_backward(*args)


def apply_propagate(*args) -> Tensor:
    """``torch.ops.gspn.propagate``, also under the transforms of torch.func."""
    return _Propagate.apply(*args) if transformed() else torch.ops.gspn.propagate(*args)  # type: ignore[return-value]


def apply_propagate_backward(*args) -> tuple[Tensor, ...]:
    """``torch.ops.gspn.propagate_backward``, also under the transforms of torch.func."""
    return _Backward.apply(*args) if transformed() else torch.ops.gspn.propagate_backward(*args)  # type: ignore[return-value]
