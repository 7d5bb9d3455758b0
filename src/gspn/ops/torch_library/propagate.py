"""``gspn::propagate`` and ``gspn::propagate_backward``.

The operator is registered with what is left when everything linear in small tensors has been done outside: the merge
folded into the projections, and the skips of all directions added up to one. Autograd differentiates that part itself.

Directions are named in one string, with commas: torch.jit's tracer has no lists of strings.

Nothing is kept for the backward but the arguments: maps and states are recomputed. A second derivative, and everything
in forward mode, goes through the composition (:mod:`gspn.ops.unfused`), which has derivatives of every order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..implementations import check_impl, resolve
from ..unfused import compose
from ..valid_size import check_valid_size
from ..validation import check_propagate, split_directions
from .line_scan import apply_line_scan
from .operator import fold, register

_ARGUMENTS = (
    "Tensor x, Tensor proxy, Tensor tap_proj, Tensor lam_proj, Tensor u_proj, Tensor? skip_proj, "
    "str directions, SymInt? segment, str impl, Tensor? valid_size=None"
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.directions, ctx.segment, ctx.impl, valid_size = inputs
    ctx.save_for_backward(*tensors, valid_size)


def _one_by_one(call, info, in_dims, arguments):
    """A mapped projection is another operator for each entry."""
    return [
        call(*(t if dim is None else t.select(dim, i) for t, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]


def _check(
    x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, impl, valid_size, grad=None, has_data=False
) -> tuple[str, ...]:
    """The directions of these arguments; raise if they are not arguments of the operator."""
    check_impl(impl)
    names = split_directions(directions)
    check_propagate(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, len(names), segment, has_data, grad=grad)
    check_valid_size(x, valid_size, has_data)
    return names


def composed_propagate(*arguments):
    """``propagate`` as its parts, each an operation with derivatives of every order in both modes."""
    *tensors, _, segment, impl, valid_size = arguments
    scan = functools.partial(_scan, impl, valid_size)
    how: Any = (*tensors, _check(*arguments), segment, scan, valid_size)
    return compose(*how)


def _scan(impl, valid_size, *arguments):
    return apply_line_scan(*arguments, impl, valid_size)


# --- propagate --------------------------------------------------------------------------------------------------------


def _run(x, *others):
    names = _check(x, *others, has_data=True)
    *projections, _, segment, impl, valid_size = others
    return resolve(impl, x, "propagate").propagate(x, *projections, names, segment, valid_size)


def _fake(x, *others):
    _check(x, *others)
    return torch.empty_like(x)


def _differentiate(ctx, grad):
    *tensors, valid_size = ctx.saved_tensors  # once: under torch.utils.checkpoint a second look would be refused
    grads = _apply_propagate_backward(grad, *tensors, ctx.directions, ctx.segment, ctx.impl, valid_size)
    needed = zip(grads, tensors, ctx.needs_input_grad[:6], strict=True)
    return (*(g if need and t is not None else None for g, t, need in needed), *(None,) * 4)


def _vmap(call, info, in_dims, x, proxy, *others):
    *others, valid_size = others
    if all(dim is None for dim in in_dims[2:6]):
        x, proxy, valid_size = fold((x, proxy, valid_size), (*in_dims[:2], in_dims[-1]), info.batch_size)
        return call(x, proxy, *others, valid_size).unflatten(0, (info.batch_size, -1)), 0
    return torch.stack(_one_by_one(call, info, in_dims, (x, proxy, *others, valid_size))), 0


apply_propagate = register(
    "propagate",
    f"({_ARGUMENTS}) -> Tensor",
    run=_run, fake=_fake, save=_save, differentiate=_differentiate, vmap=_vmap, composition=composed_propagate,
)  # fmt: skip


# --- propagate_backward -----------------------------------------------------------------------------------------------


def _run_backward(grad, x, *others):
    names = _check(x, *others, grad=grad, has_data=True)
    *projections, _, segment, impl, valid_size = others
    backend = resolve(impl, x, "propagate")
    *grads, dskip = backend.propagate_backward(grad, x, *projections, names, segment, valid_size)
    # An operator cannot return None: the gradient of a skip that is not there is an empty tensor.
    return (*grads, x.new_empty(0) if dskip is None else dskip)


def _fake_backward(grad, x, *others):
    _check(x, *others, grad=grad)
    proxy, *projections, skip_proj = others[:5]
    return (
        *(torch.empty_like(t) for t in (x, proxy)),
        *(t.new_empty(t.shape) for t in projections),
        x.new_empty(0) if skip_proj is None else skip_proj.new_empty(skip_proj.shape),
    )


def _compose_backward(tensors, *how) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The tensors that are there, and the function that gives the gradients of the composition at them."""

    def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        skip = () if len(inputs) == 6 else (None,)
        pull: Any = torch.func.vjp(lambda *inputs: composed_propagate(*inputs, *skip, *how), *inputs)[1]
        return pull(grad)

    return [t for t in tensors if t is not None], gradients


def _composition_backward(*arguments):
    present, gradients = _compose_backward(arguments[:7], *arguments[7:])
    grads = gradients(*present)
    return grads if len(grads) == 6 else (*grads, present[0].new_empty(0))


def _differentiate_backward(ctx, *cotangents):
    *tensors, valid_size = ctx.saved_tensors
    present, gradients = _compose_backward(tensors, ctx.directions, ctx.segment, ctx.impl, valid_size)
    pull: Any = torch.func.vjp(gradients, *present)[1]
    second = pull(cotangents[: len(present) - 1])
    # Only the skip, the last tensor, may be missing.
    return (*second, *(None,) * (11 - len(second)))


def _vmap_backward(call, info, in_dims, *arguments):
    # Every entry has projection gradients of its own, so nothing can be folded into the batch.
    results = _one_by_one(call, info, in_dims, arguments)
    return tuple(torch.stack(grads) for grads in zip(*results, strict=True)), (0,) * 6


_apply_propagate_backward = register(
    "propagate_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> "
    "(Tensor dx, Tensor dproxy, Tensor dtap_proj, Tensor dlam_proj, Tensor du_proj, Tensor dskip_proj)",
    run=_run_backward, fake=_fake_backward, save=_save, differentiate=_differentiate_backward, vmap=_vmap_backward,
    composition=_composition_backward,
)  # fmt: skip
