"""What the operators share under the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def transformed() -> bool:
    """Whether a transform of torch.func is active and nothing is being compiled.

    The derivatives that torch.library registers do not compose with torch.func.grad and its relatives (PyTorch asks for
    an autograd.Function with a separate setup_context). Under such a transform the same formulas go through one.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def fold(tensors: Sequence[Tensor | None], in_dims: Sequence[int | None], size: int) -> list[Tensor | None]:
    """Each ``[B, ...]`` with a mapped axis somewhere to ``[size * B, ...]``: a scan's batch entries are independent."""
    folded: list[Tensor | None] = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        if tensor is None:
            folded.append(None)
            continue
        mapped = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(mapped.flatten(0, 1))
    return folded
