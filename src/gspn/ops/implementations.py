"""The backends: those that exist, those that can run a call here, and the one that ``impl="auto"`` takes.

A new backend is a folder with the functions of :mod:`gspn.ops.backend`, and an entry in :data:`BACKENDS`.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference, triton
from .backend import Backend, NotInstalled

OPS: tuple[str, ...] = ("propagate", "line_scan")
"""Operators that have implementations to choose from."""

BACKENDS: tuple[Backend, ...] = (triton, cpu, reference)
"""The fastest first: ``"auto"`` takes the first that can run. The last one runs everywhere."""

IMPLEMENTATIONS: dict[str, Backend] = {backend.__name__.rpartition(".")[2]: backend for backend in BACKENDS}
"""The backends by name, which is what ``impl`` names."""

# "auto" must not ask the backends again on every call: they look for compilers, libraries and devices. The GPUs of a
# machine need not be alike.
_auto_choice: dict[tuple[str, torch.device, torch.dtype], Any] = {}


def check_impl(impl: Any) -> None:
    """Raise TypeError or ValueError unless ``impl`` is ``"auto"`` or names an implementation."""
    if not isinstance(impl, str) or (impl != "auto" and impl not in IMPLEMENTATIONS):
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        error = ValueError if isinstance(impl, str) else TypeError
        raise error(f"{impl=} is not an implementation; use one of {names}.")


def available_impls(x: Tensor, op: str = "propagate") -> dict[str, str | None]:
    """Which implementations of ``op`` can run on a tensor like ``x``, here and now.

    Args:
        x: a tensor of the device and dtype in question; its values and shape do not matter.
        op: the operator, ``"propagate"`` or ``"line_scan"``.

    Returns:
        For each implementation, the fastest first, None where it can run, else the reason why it cannot.

    Raises:
        TypeError: if ``x`` is not a tensor.
        ValueError: if ``op`` is not an operator of this library.

    Example:
        >>> import torch, gspn
        >>> gspn.available_impls(torch.zeros(1))["reference"] is None
        True
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; pass a tensor of the device and dtype in question.")
    if op not in OPS:
        raise ValueError(f"{op=} is not an operator with implementations; use one of {', '.join(OPS)}.")
    return {name: backend.why_not(x.device, x.dtype, op) for name, backend in IMPLEMENTATIONS.items()}


def _choose(device: torch.device, dtype: torch.dtype, op: str) -> Backend:
    reasons: dict[str, str] = {}
    *fast, slowest = IMPLEMENTATIONS
    for name in fast:
        reason = IMPLEMENTATIONS[name].why_not(device, dtype, op)
        if reason is None:
            return IMPLEMENTATIONS[name]
        reasons[name] = reason
    # The fastest that is made for this device, else the fastest of all. The dictionary of choices makes the warning
    # come once for each device, dtype and operator.
    refused = next((name for name in fast if device.type in IMPLEMENTATIONS[name].DEVICES), fast[0])
    warnings.warn(
        f"gspn.{op} runs its slow PyTorch loop on {device.type} for {dtype}: {refused} cannot run, {reasons[refused]} "
        f"Pass impl={slowest!r} to choose the loop yourself and silence this.",
        RuntimeWarning,
        stacklevel=2,
    )
    return IMPLEMENTATIONS[slowest]


def _module(backend: Backend, op: str) -> Any:
    return importlib.import_module(f"{backend.__name__}.{op}")


def resolve(impl: str, like: Tensor, op: str) -> Any:
    """The module that computes ``op`` on tensors like ``like``; its functions are those of :mod:`gspn.ops.backend`.

    Raises:
        NotImplementedError: if ``impl`` was named and cannot run on this device and dtype.
        ImportError: if ``impl`` was named and something it needs is not installed.
    """
    if impl == "auto":
        key = (op, like.device, like.dtype)
        if key not in _auto_choice:
            _auto_choice[key] = _module(_choose(like.device, like.dtype, op), op)
        return _auto_choice[key]
    backend = IMPLEMENTATIONS[impl]
    reason = backend.why_not(like.device, like.dtype, op)
    if reason is not None:
        error = ImportError if isinstance(reason, NotInstalled) else NotImplementedError
        raise error(f"impl={impl!r} cannot run {op} here: {reason}")
    return _module(backend, op)
