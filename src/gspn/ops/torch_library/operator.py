"""Registers an operator with PyTorch: what runs, shapes without data, derivatives and vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def register(
    name: str, schema: str, *, run: Callable[..., Any], fake: Callable[..., Any], save: Callable[..., None],
    differentiate: Callable[..., Any], vmap: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """Register ``torch.ops.gspn.NAME``, and return the operator for use under the transforms of torch.func too.

    The derivatives that torch.library registers do not compose with torch.func.grad and its relatives (PyTorch asks for
    an autograd.Function with a separate setup_context). Under such a transform the same formulas go through one.

    Args:
        name: that of the operator.
        schema: its arguments and results, as ``torch.library.define`` takes them.
        run: the computation.
        fake: the same call with empty results, for tracing.
        save: ``(ctx, inputs, output)``, keeps what the derivative needs.
        differentiate: ``(ctx, *gradients)`` to the gradients of the inputs.
        vmap: the rule of ``torch.library.register_vmap``.
    """
    qualified = f"gspn::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, differentiate, setup_context=save)
    torch.library.register_vmap(qualified, vmap)
    op = getattr(torch.ops.gspn, name)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)  # pyright: ignore[reportAssignmentType]

        @staticmethod
        def forward(*args):
            return op(*args)

    def apply(*args):
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return Function.apply(*args) if transformed else op(*args)

    return apply


def fold(tensors: Sequence[Tensor | None], in_dims: Sequence[int | None], size: int) -> list[Tensor | None]:
    """Each ``[B, ...]`` with a mapped axis somewhere to ``[size * B, ...]``: a scan's batch entries are independent."""
    return [
        None if t is None
        else (t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]  # fmt: skip
