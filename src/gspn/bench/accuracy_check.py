"""The rule that an implementation has to pass before its time may be reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR_EPS = 4
# In float64 the exact result has roundings of the same size, which nothing finer shows, and they grow with the number
# of lines.
_FLOOR_EPS_DOUBLE = 32


@dataclass(frozen=True)
class Accuracy:
    """The error of one result, and the largest error that is accepted."""

    name: str
    error: float
    """Largest absolute difference from the float64 reference."""
    plain_error: float
    """The same for the reference implementation in the dtype under test."""
    bound: float
    """``max(2 plain_error, 4 eps max|exact|)``, with 32 eps in float64."""

    @property
    def ok(self) -> bool:
        """Whether the error is accepted."""
        return self.error <= self.bound  # False for NaN


class CheckFailedError(RuntimeError):
    """A candidate's results are wrong, so its time means nothing."""


def compare(results: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> list[Accuracy]:
    """Compare results with the exact ones: twice the error of plain PyTorch in the same dtype is accepted.

    Where plain PyTorch is exact or nearly so, a few roundings of the largest value are accepted: sums taken in another
    order differ by as much.

    Args:
        results: the outputs and gradients under test, by name.
        plain: the same from the reference implementation, with the same dtype and inputs.
        exact: the same in float64 from the same inputs.

    Returns:
        An accuracy for each name.
    """
    accuracies = []
    for name, result in results.items():
        eps = torch.finfo(result.dtype).eps
        plain_error = _largest(plain[name].double() - exact[name])
        floor = _FLOOR_EPS_DOUBLE if result.dtype == torch.float64 else _FLOOR_EPS
        bound = max(2 * plain_error, floor * eps * _largest(exact[name]))
        accuracies.append(Accuracy(name, _largest(result.double() - exact[name]), plain_error, bound))
    return accuracies


def require_accurate(checked: Mapping[str, Sequence[Accuracy]]) -> None:
    """Raise unless every accuracy of every candidate is accepted.

    Raises:
        CheckFailedError: with each result that is not, its error and the bound.
    """
    wrong = [
        f"{candidate}: {one.name} is off by {one.error:.3g}, and {one.bound:.3g} is accepted"
        for candidate, accuracies in checked.items()
        for one in accuracies
        if not one.ok
    ]
    if wrong:
        raise CheckFailedError("; ".join(wrong))


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
