"""Candidates side by side on square maps that grow until a call takes too long."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .accuracy_check import Accuracy
from .attention import attention_backend
from .report import Result
from .timing import Candidate, peak_memory, time_interleaved

CPU = torch.device("cpu")
# An exponent describes large maps: on small ones the overhead of calls, and caches, hide it.
FITTED = 4


@dataclass(frozen=True, kw_only=True)
class SizeSweep(ABC):
    """A benchmark on growing maps; a subclass says what its candidates run.

    Args:
        batch: maps, or images, in a call.
        dtype: the dtype of every tensor.
        device: the device that it runs on.
        mode: ``"forward"``, or ``"train"`` for forward and backward.
    """

    benchmark: ClassVar[str]
    """The name of the benchmark in the CSV."""
    candidates: ClassVar[tuple[str, ...]]
    baseline: ClassVar[str]
    """The candidate that ratios are to."""

    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    mode: str = "forward"

    @abstractmethod
    def check(self) -> dict[str, list[Accuracy]]:
        """Compare candidates with their float64 specification on a small map, odd and not square."""

    @abstractmethod
    def calls(self, candidates: Sequence[str], size: int) -> dict[str, Callable[[], object]]:
        """The call to time for each candidate, on maps of ``size`` x ``size``."""

    def macs(self, candidate: str, size: int) -> int | None:  # noqa: ARG002
        """Multiply-adds for one map; None where they are not counted."""
        return None

    def params(self, candidate: str) -> int:  # noqa: ARG002
        """The number of parameters."""
        return 0

    def described_mode(self) -> str:
        """The column ``mode`` of the CSV."""
        return self.mode

    def measure(
        self,
        sizes: Sequence[int],
        candidates: Sequence[str] | None = None,
        *,
        slowest_ms: float = 1000.0,
        repeats: int = 5,
        min_time: float = 0.1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """Time the candidates at each size, in turns; run :meth:`check` before.

        A candidate drops out before the size at which a call would take longer than ``slowest_ms``, judged by the
        growth of its time, so a run ends by itself.

        Args:
            sizes: H = W of the maps.
            candidates: which to time; all by default.
            slowest_ms: the longest call to time.
            repeats: see :func:`~gspn.bench.timing.time_interleaved`.
            min_time: see :func:`~gspn.bench.timing.time_interleaved`.
            progress: called with (sizes done, sizes planned).

        Returns:
            A result for each size and candidate, in this order. The last one of a candidate that dropped out has the
            reason instead of a time.
        """
        running, results, sizes = list(candidates or self.candidates), list[Result](), sorted(set(sizes))
        for done, size in enumerate(sizes):
            if progress is not None:
                progress(done, len(sizes))
            skipped = {}
            for name in running:
                expected = _expected_ms([r for r in results if r.name == name], size)
                if expected is not None and expected > slowest_ms:
                    skipped[name] = f"a call would take about {expected:.0f} ms, more than {slowest_ms:.0f}"
            calls = self.calls([name for name in running if name not in skipped], size)
            timings = time_interleaved(
                [Candidate(name, call) for name, call in calls.items()], self.device, repeats=repeats, min_time=min_time
            )
            base = timings.get(self.baseline)
            results += [
                Result(
                    name=name, mode=self.described_mode(), batch=self.batch, height=size, width=size, dtype=self.dtype,
                    timing=timings.get(name), baseline=self.baseline, baseline_ms=None if base is None else base.p50,
                    peak_bytes=peak_memory(calls[name], self.device) if name in calls else None,
                    skipped=skipped.get(name, ""),
                    details={
                        "bench": self.benchmark, "params": self.params(name), "macs": self.macs(name, size),
                        "attention": attention_backend(calls[name]) if name in calls else "",
                    },
                )
                for name in running
            ]  # fmt: skip
            running = [name for name in running if name not in skipped]
        if progress is not None:
            progress(len(sizes), len(sizes))
        return results


def timed_call(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *, train: bool, parameters: Sequence[Tensor] = ()
) -> Callable[[], object]:
    """A call of ``function(*inputs)`` without gradients, or with the gradients of all inputs and parameters."""
    if not train:
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.no_grad():
        grad = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), [*leaves, *parameters], grad)


def fitted_exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """The exponent p of ``time = c size^p``, by least squares on the logarithms; None for fewer than two sizes.

    Example:
        >>> fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0])
        2.0
    """
    if len(set(sizes)) < 2:
        return None
    logs = ([math.log(value) for value in values] for values in (sizes, times))
    return round(statistics.linear_regression(*logs).slope, 6)


def exponents(results: Sequence[Result], last: int | None = FITTED) -> dict[str, float]:
    """For each candidate the exponent p of ``time ~ pixels^p``, fitted over its ``last`` largest maps, or over all."""
    fitted = {}
    for name in dict.fromkeys(r.name for r in results):
        timed = [(r.height * r.width, r.timing.p50) for r in results if r.name == name and r.timing is not None]
        timed = timed if last is None else timed[-last:]
        p = fitted_exponent([size for size, _ in timed], [ms for _, ms in timed])
        if p is not None:
            fitted[name] = p
    return fitted


def _expected_ms(before: Sequence[Result], size: int) -> float | None:
    timed = [(r.height * r.width, r.timing.p50) for r in before if r.timing is not None][-2:]
    if not timed:
        return None
    growth = fitted_exponent([pixels for pixels, _ in timed], [ms for _, ms in timed])
    # At least linear: a map twice as large is not free because small ones were.
    return timed[-1][1] * (size * size / timed[-1][0]) ** max(growth or 1.0, 1.0)
