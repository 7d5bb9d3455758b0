"""The rule an implementation has to pass before its time may be reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR_EPS = 4
# In float64 the truth has the same roundings, which nothing finer shows, and they grow with the number of lines.
_FLOOR_EPS_DOUBLE = 32


@dataclass(frozen=True)
class Figure:
    """How far one result is from the truth, and how far it may be."""

    name: str
    error: float
    """Largest absolute difference from the float64 reference."""
    plain_error: float
    """The same of the reference implementation in the dtype under test."""
    bound: float
    """``max(2 plain_error, 4 eps max|exact|)``, with 32 eps in float64."""

    @property
    def ok(self) -> bool:
        """Whether the implementation may be reported, as far as this result goes."""
        return self.error <= self.bound  # False for NaN


def compare(results: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> list[Figure]:
    """Hold results against the truth: an error of at most twice that of plain PyTorch in the same dtype is accepted.

    Where plain PyTorch happens to be exact, or nearly, a few roundings of the largest value are accepted: sums taken in
    another order differ by as much.

    Args:
        results: the outputs and gradients under test, by name.
        plain: the same of the reference implementation, same dtype and inputs.
        exact: the same in float64 from the same inputs.

    Returns:
        A figure for each name.
    """
    figures = []
    for name, result in results.items():
        truth = exact[name]
        eps = torch.finfo(result.dtype).eps
        plain_error = _largest(plain[name].double() - truth)
        floor = _FLOOR_EPS_DOUBLE if result.dtype == torch.float64 else _FLOOR_EPS
        bound = max(2 * plain_error, floor * eps * _largest(truth))
        figures.append(Figure(name, _largest(result.double() - truth), plain_error, bound))
    return figures


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
