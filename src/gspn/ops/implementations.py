"""Which implementations exist, which of them can run a call here, and which one ``impl="auto"`` takes.

An implementation says *how*, never *what*: all of them compute the function of :mod:`gspn.ops.reference`. Each is a
module with one function per operator, imported when it is first used, and a predicate that answers both the automatic
choice and an explicit request.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, triton
from .reasons import NotInstalled

OPS: tuple[str, ...] = ("propagate", "line_scan")
"""Operators that have implementations to choose from."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operators."""

    name: str
    modules: Mapping[str, str]
    """Where the function of each operator is; imported by the first call that needs it."""
    why_not: Callable[[torch.device, torch.dtype, str], str | None]
    """``(device, dtype, op)`` to the reason it cannot run, or None."""

    def load(self, op: str) -> ModuleType:
        """Import the module that has ``op``, at once if it has been before."""
        return importlib.import_module(self.modules[op], __package__)


def _reference_why_not(device: torch.device, dtype: torch.dtype, op: str) -> str | None:
    return None


IMPLEMENTATIONS: dict[str, Implementation] = {
    impl.name: impl
    for impl in (
        # The fastest first: "auto" takes the first that can run.
        Implementation("triton", {"line_scan": ".triton.line_scan", "propagate": ".triton.propagate"}, triton.why_not),
        Implementation("cpu", {"line_scan": ".cpu.line_scan", "propagate": ".cpu.propagate"}, cpu.why_not),
        Implementation("reference", dict.fromkeys(OPS, ".reference"), _reference_why_not),
    )
}
"""Every implementation by name, the fastest first."""

# "auto" must not ask the predicates again on every call: they look for compilers, libraries and devices.
_auto_choice: dict[tuple[str, str, torch.dtype], Implementation] = {}


def check_op(op: str) -> None:
    """Raise ValueError unless ``op`` names an operator that has implementations."""
    if op not in OPS:
        raise ValueError(f"{op=} is not an operator with implementations; use one of {', '.join(OPS)}.")


def check_impl(impl: str) -> None:
    """Raise ValueError unless ``impl`` is ``"auto"`` or names an implementation."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"{impl=} is not an implementation; use one of {names}.")


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
    check_op(op)
    return {name: impl.why_not(x.device, x.dtype, op) for name, impl in IMPLEMENTATIONS.items()}


def _choose(device: torch.device, dtype: torch.dtype, op: str) -> Implementation:
    reasons = {}
    for name, impl in IMPLEMENTATIONS.items():
        reason = impl.why_not(device, dtype, op)
        if reason is None:
            break
        reasons[name] = reason
    else:
        raise RuntimeError("the reference implementation refused to run; this is a bug in gspn.")
    if impl.name == "reference":
        # The dictionary of choices makes this once for each device type, dtype and operator.
        wanted = "cpu" if device.type == "cpu" else "triton"
        warnings.warn(
            f"gspn.{op} runs its slow PyTorch loop on {device.type} for {dtype}: {wanted} cannot run, "
            f"{reasons[wanted]} Pass impl='reference' to choose the loop yourself and silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
    return impl


def resolve(impl: str, like: Tensor, op: str) -> ModuleType:
    """The module whose function ``op`` computes a call on tensors like ``like``.

    Raises:
        NotImplementedError: if ``impl`` was named and cannot run on this device and dtype.
        ImportError: if ``impl`` was named and something it needs is not installed.
    """
    if impl == "auto":
        key = (op, like.device.type, like.dtype)
        chosen = _auto_choice.get(key)
        if chosen is None:
            chosen = _auto_choice[key] = _choose(like.device, like.dtype, op)
        return chosen.load(op)
    implementation = IMPLEMENTATIONS[impl]
    reason = implementation.why_not(like.device, like.dtype, op)
    if reason is not None:
        error = ImportError if isinstance(reason, NotInstalled) else NotImplementedError
        raise error(f"impl={impl!r} cannot run {op} here: {reason}")
    return implementation.load(op)
