"""``gspn::propagate`` and ``gspn::propagate_backward``.

The operator is registered with what is left when everything linear in small tensors has been done outside: the merge
folded into the projections, and the skips of all directions added up to one. Autograd differentiates that part itself.

Directions are named in one string, with commas: torch.jit's tracer has no lists of strings.

Nothing is kept for the backward but the arguments: maps and states are recomputed. A second derivative goes through the
composition (:mod:`gspn.ops.unfused`), which has derivatives of every order.
"""

from __future__ import annotations

from typing import Any

import torch

from ..implementations import resolve
from ..unfused import compose
from .line_scan import apply_line_scan
from .operator import fold, register

_ARGUMENTS = (
    "Tensor x, Tensor proxy, Tensor tap_proj, Tensor lam_proj, Tensor u_proj, Tensor? skip_proj, "
    "str directions, SymInt? segment, str impl"
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.directions, ctx.segment, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _one_by_one(op, info, in_dims, tensors, rest):
    """A mapped projection is another operator for each entry."""
    return [
        op(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)), *rest)
        for i in range(info.batch_size)
    ]


# --- propagate --------------------------------------------------------------------------------------------------------


def _run(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl):
    module = resolve(impl, x, "propagate")
    return module.propagate(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, tuple(directions.split(",")), segment)


def _differentiate(ctx, grad):
    tensors = ctx.saved_tensors  # once: under torch.utils.checkpoint a second look would be refused
    grads = _apply_propagate_backward(grad, *tensors, ctx.directions, ctx.segment, ctx.impl)
    needed = zip(grads, tensors, ctx.needs_input_grad[:6], strict=True)
    return (*(g if need and t is not None else None for g, t, need in needed), None, None, None)


def _vmap(info, in_dims, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, *rest):
    op, projections = torch.ops.gspn.propagate, (tap_proj, lam_proj, u_proj, skip_proj)
    if all(dim is None for dim in in_dims[2:6]):
        y = op(*fold((x, proxy), in_dims[:2], info.batch_size), *projections, *rest)
        return y.unflatten(0, (info.batch_size, -1)), 0
    return torch.stack(_one_by_one(op, info, in_dims[:6], (x, proxy, *projections), rest)), 0


apply_propagate = register(
    "propagate",
    f"({_ARGUMENTS}) -> Tensor",
    run=_run, fake=lambda x, *_: torch.empty_like(x), save=_save, differentiate=_differentiate, vmap=_vmap,
)  # fmt: skip


# --- propagate_backward -----------------------------------------------------------------------------------------------


def _run_backward(grad, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl):
    module = resolve(impl, x, "propagate")
    *grads, dskip = module.propagate_backward(
        grad, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, tuple(directions.split(",")), segment
    )
    # An operator cannot return None: the gradient of a skip that is not there is an empty tensor.
    return (*grads, x.new_empty(0) if dskip is None else dskip)


def _fake_backward(grad, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl):
    return (
        *(torch.empty_like(t) for t in (x, proxy)),
        *(t.new_empty(t.shape) for t in (tap_proj, lam_proj, u_proj)),
        x.new_empty(0) if skip_proj is None else skip_proj.new_empty(skip_proj.shape),
    )


def _differentiate_backward(ctx, *cotangents):
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
        second = torch.autograd.grad(
            first, [grad, *present], cotangents[: len(present)], create_graph=further, allow_unused=True
        )
    # Only the skip, the last tensor, may be missing.
    return (*second, *(None,) * (10 - len(second)))


def _vmap_backward(info, in_dims, *arguments):
    # Every entry has projection gradients of its own, so nothing can be folded into the batch.
    tensors, rest = arguments[:7], arguments[7:]
    results = _one_by_one(torch.ops.gspn.propagate_backward, info, in_dims[:7], tensors, rest)
    return tuple(torch.stack(grads) for grads in zip(*results, strict=True)), (0,) * 6


_apply_propagate_backward = register(
    "propagate_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> "
    "(Tensor dx, Tensor dproxy, Tensor dtap_proj, Tensor dlam_proj, Tensor du_proj, Tensor dskip_proj)",
    run=_run_backward, fake=_fake_backward, save=_save, differentiate=_differentiate_backward, vmap=_vmap_backward,
)  # fmt: skip
