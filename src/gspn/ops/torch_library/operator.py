"""Registers an operator with PyTorch: what runs, shapes without data, derivatives of both modes, and vmap."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

# Besides autograd: a subclass of Tensor, a mode, a transform, or just the device's kernels.
_OTHER_KEYS = torch._C._after_autograd_keyset.remove(torch._C.DispatchKey.ADInplaceOrView)
_PLAIN = {torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)}


def _in_forward_mode() -> bool:
    """Whether tensors may have tangents: inside ``forward_ad.dual_level``, which torch.func.jvp opens too."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def register(
    name: str, schema: str, *, run: Callable[..., Any], fake: Callable[..., Any], save: Callable[..., None],
    differentiate: Callable[..., Any], vmap: Callable[..., Any], tangent: Callable[..., Any] | None = None,
    composition: Callable[..., Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Register ``torch.ops.gspn.NAME``, and return the function to call, which takes every kind of derivative.

    PyTorch differentiates a registered operator in reverse mode alone. What torch.library registers drops tangents
    without a word, and raises under torch.func.grad and its relatives, which ask for an autograd.Function with a
    separate setup_context. So the function returned goes through one wherever a transform or forward mode is active.
    The operator itself raises there.

    Args:
        name: that of the operator.
        schema: its arguments and results, as ``torch.library.define`` takes them.
        run: checks the arguments and computes.
        fake: checks the arguments and returns empty results, for tracing.
        save: ``(ctx, inputs, output)``, keeps what the derivative needs.
        differentiate: ``(ctx, *gradients)`` to the gradients of the inputs.
        vmap: ``(call, info, in_dims, *arguments)``, the rule of ``torch.library.register_vmap`` in terms of ``call``.
        tangent: ``(inputs, output, *tangents)`` to the tangents of the results; or else
        composition: the same computation from operations that all have tangents, which runs in forward mode instead.
    """
    qualified = f"gspn::{name}"
    torch.library.define(qualified, schema)
    op = getattr(torch.ops.gspn, name).default
    arguments = op._schema.arguments
    # Those that may have derivatives come first.
    tensors = len(list(itertools.takewhile(lambda argument: "Tensor" in str(argument.type), arguments)))

    def completed(args: Sequence[Any]) -> tuple[Any, ...]:
        # The dispatcher leaves out what is equal to a default at the end, and every default is None.
        return (*args, *(None,) * (len(arguments) - len(args)))

    torch.library.impl(qualified, "CompositeExplicitAutograd", lambda *args: run(*completed(args)))

    def traced(*args):
        if torch.onnx.is_in_onnx_export() and "gspn.export" not in sys.modules:
            # The exporter would say no more than that it has no function for the operator.
            warnings.warn(
                f"torch.onnx.export translates {qualified} once gspn.export is imported: add `import gspn.export`, or "
                "call gspn.export.to_onnx.",
                stacklevel=2,
            )
        return fake(*completed(args))

    torch.library.register_fake(qualified, traced)

    def mapped(call: Callable[..., Any], info: Any, in_dims: tuple, *args: Any):
        if info.batch_size:
            return vmap(call, info, in_dims, *args)
        # Without an entry, one of zeros tells the shapes of the results.
        mapped_axes = zip(args, in_dims, strict=True)
        results = call(*(a if d is None else a.new_zeros(a.shape[:d] + a.shape[d + 1 :]) for a, d in mapped_axes))
        empty = tree_map(lambda result: result.new_empty(0, *result.shape), results)
        return empty, tree_map(lambda _: 0, empty)

    def registered_vmap(info: Any, in_dims: tuple, *args: Any):
        return mapped(op, info, completed(in_dims), *completed(args))

    torch.library.register_vmap(qualified, registered_vmap)
    without_autograd = torch._C._after_autograd_keyset

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args_and_keys):
            *args, keys = args_and_keys
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(keys & without_autograd, *args)
            save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return (*differentiate(ctx, *grads), None)

    def autograd(keys, *args):
        args = completed(args)
        differentiated = False
        if torch.is_grad_enabled():
            for t in args[:tensors]:
                if t is not None and t.requires_grad:
                    differentiated = True
        if (differentiated and torch._C._are_functorch_transforms_active()) or (
            _in_forward_mode()
            and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in args[:tensors])
        ):
            raise NotImplementedError(
                f"torch.ops.gspn.{name} itself has derivatives neither under the transforms of torch.func nor in "
                f"forward mode, and torch.compile sees nothing else; call gspn.{name.removesuffix('_backward')}, and "
                f"not inside torch.compile."
            )
        if differentiated:
            return Node.apply(*args, keys)
        if (keys & _OTHER_KEYS).raw_repr() in _PLAIN:
            return run(*args)  # nobody else wants to see the call, and to ask takes longer than a scan of a small map
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & without_autograd, *args)

    library = torch.library.Library("gspn", "FRAGMENT")
    library.impl(name, autograd, "Autograd", with_keyset=True)
    _libraries.append(library)

    class Function(torch.autograd.Function):
        backward = staticmethod(differentiate)  # pyright: ignore[reportAssignmentType]

        @staticmethod
        def forward(*args):
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs, output):
            save(ctx, inputs, output)
            outputs = (output,) if isinstance(output, Tensor) else output
            ctx.save_for_forward(*inputs[:tensors], *outputs)
            ctx.others = inputs[tensors:]

        @staticmethod
        def vmap(info, in_dims, *args):
            return mapped(apply, info, in_dims, *args)

        if tangent is not None:

            @staticmethod
            def jvp(ctx: Any, *tangents):
                # PyTorch turns forward mode off here, that of enclosing transforms too. When it is on again, the
                # tensors must come without this transform's own tangents.
                with forward_ad._set_fwd_grad_enabled(True):
                    saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
                    return tangent(  # pyright: ignore[reportOptionalCall]
                        (*saved[:tensors], *ctx.others), saved[tensors:], *tangents
                    )

    def apply(*args):
        args = completed(args)
        if torch.compiler.is_compiling():
            return op(*args)
        if _in_forward_mode():
            return Function.apply(*args) if composition is None else composition(*args)
        return Function.apply(*args) if torch._C._are_functorch_transforms_active() else op(*args)

    return apply


# Registrations end with their Library object.
_libraries: list[torch.library.Library] = []


def fold(tensors: Sequence[Tensor | None], in_dims: Sequence[int | None], size: int) -> list[Tensor | None]:
    """Each ``[B, ...]`` with a mapped axis somewhere to ``[size * B, ...]``: a scan's batch entries are independent."""
    folded: list[Tensor | None] = []
    for t, dim in zip(tensors, in_dims, strict=True):
        if t is not None:
            t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            t = t.flatten(0, 1) if t.dim() > 1 else t  # the operator refuses what has no batch
        folded.append(t)
    return folded
