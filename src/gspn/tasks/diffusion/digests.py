"""Digests of values, weights and files, which tell whether something is the same as before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_FEW = 8  # numbers of each weight in a fingerprint, at least


def digest(parts: Iterable[Any]) -> str:
    """The SHA-256 of parts in their order: of a tensor's bytes, of bytes, and of anything else as JSON.

    Example:
        >>> digest(["red", torch.zeros(2)]) == digest(["red", torch.zeros(3)])
        False
    """
    hasher = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = memoryview(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        elif not isinstance(part, bytes):
            part = json.dumps(part).encode()
        hasher.update(part)
    return hasher.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """The digest of a module's weights with their names, dtypes and shapes, wherever they were loaded from.

    Example:
        >>> one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> weights_digest(one) == weights_digest(other)
        False
    """
    state = sorted(module.state_dict().items())
    return digest(part for name, t in state for part in ([name, str(t.dtype), list(t.shape)], t))


def fingerprint(module: nn.Module) -> str:
    """A short digest of a few numbers of each weight: almost free, and different for weights of another training."""

    def parts() -> Iterator[Any]:
        for name, value in sorted(module.state_dict().items()):
            flat = value.detach().reshape(-1)
            yield f"{name}{tuple(value.shape)}{value.dtype}".encode()
            yield flat[:: max(1, flat.numel() // _FEW)][: 2 * _FEW].double()

    return digest(parts())[:16]
