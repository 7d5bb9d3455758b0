"""Attention to compare with, softmax and linear, over the pixels of a map; and the backend that a call runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SELF_ATTENTION, LINEAR_ATTENTION = "self-attention", "linear attention"
NO_ATTENTION = "none"


def head_count(dim: int) -> int:
    """The number of heads: of 64 channels where 64 divides ``dim``, else of 32, else one."""
    return next((dim // size for size in (64, 32) if dim % size == 0), 1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the kernel ``elu + 1``, not causal, on ``[B, heads, N, d]``: linear in N, with no N x N matrix."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = k.transpose(-1, -2) @ v  # [B, heads, d, d]
    norm = q @ k.sum(-2).unsqueeze(-1)  # [B, heads, N, 1]
    return q @ context / norm


class MapAttention(nn.Module):
    """Self-attention over the pixels of a map: queries, keys and values, softmax or linear attention, projection out.

    Args:
        dim: channels in and out, in :func:`head_count` heads.
        linear: whether to take :func:`linear_attention` instead of softmax attention.

    Example:
        >>> import torch
        >>> MapAttention(64)(torch.randn(1, 64, 5, 7)).shape
        torch.Size([1, 64, 5, 7])
    """

    def __init__(self, dim: int, *, linear: bool = False) -> None:
        super().__init__()
        self.heads = head_count(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.attend = linear_attention if linear else F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``; channels_last maps are not copied on the way in or out."""
        batch, dim, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, dim]
        q, k, v = self.qkv(tokens).view(batch, -1, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = self.attend(q, k, v).transpose(1, 2).reshape(batch, -1, dim)
        return self.out_proj(mixed).transpose(1, 2).unflatten(2, (height, width))


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        # In inference mode composite operators arrive whole, with what they are made of still to be chosen.
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def attention_backend(call: Callable[[], object]) -> str:
    """The backend of scaled dot-product attention that a call runs: ``flash``, ``efficient``, ``cudnn``, ``math``.

    Args:
        call: is run once.

    Returns:
        The backends, joined with ``+`` if there are several; ``"math"`` where the whole matrix of weights is computed,
        by PyTorch or by the model itself; ``"none"`` without attention.

    Example:
        >>> import torch
        >>> attention_backend(lambda: torch.ones(2, 2).relu())
        'none'
    """
    with _Operators() as operators:
        call()
    backends = []
    for name in sorted(operators.seen):
        match = re.fullmatch(r"aten::_scaled_dot_product_(?:fused_)?(\w+?)_attention(_for_cpu|_overrideable)?", name)
        if match:
            backends.append(match.group(1))
    # The matrix of weights itself is a softmax between two products. A softmax alone may be of taps.
    if operators.seen & {"aten::_softmax", "aten::_safe_softmax"} and operators.seen & {"aten::bmm", "aten::baddbmm"}:
        backends.append("math")
    return "+".join(dict.fromkeys(backends)) or NO_ATTENTION
