"""Networks and modules side by side: a row for each, the memory of one call, and what computed its attention."""

from __future__ import annotations

import csv
import ctypes
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .._files import replaced
from .environment import Environment
from .report import Cell
from .timing import Timing

NO_ATTENTION = "none"


@dataclass(frozen=True)
class Result:
    """One candidate at one size, with the baseline of the same run."""

    bench: str
    """``"models"`` or ``"mixer"``."""
    name: str
    mode: str
    batch: int
    height: int
    width: int
    dtype: str
    params: int
    macs: int | None
    """Multiply-adds an image; None where they could not be counted."""
    attention: str
    """The backend of scaled dot-product attention that ran, or ``"none"``."""
    baseline: str
    timing: Timing | None
    """None if it was skipped."""
    peak_bytes: int | None
    """What memory one call takes beyond what was there, weights left out; None where the system does not tell."""
    ratio: float | None
    """The baseline's p50 over this one's: above 1 is faster than the baseline."""
    skipped: str = ""
    """The reason why there is no time."""

    @property
    def images_per_second(self) -> float | None:
        """Images, or maps, a second at the p50."""
        return None if self.timing is None else self.batch / self.timing.p50 * 1e3

    def row(self, environment: Environment, date: datetime) -> dict[str, Cell]:
        """The CSV's columns, in order."""
        timing = self.timing
        quantiles = {f"p{q}_ms": None if timing is None else _rounded(timing.quantile(q / 100)) for q in (20, 50, 80)}
        return {
            "bench": self.bench,
            "name": self.name,
            "mode": self.mode,
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "dtype": self.dtype,
            "params": self.params,
            "macs": self.macs,
            "attention": self.attention,
            **quantiles,
            "samples": 0 if timing is None else len(timing.samples_ms),
            "images_per_second": _rounded(self.images_per_second),
            "peak_memory_mb": None if self.peak_bytes is None else _rounded(self.peak_bytes / 1e6),
            "baseline": self.baseline,
            "speedup_over_baseline": _rounded(self.ratio),
            "skipped": self.skipped,
            **asdict(environment),
            "date": date.isoformat(timespec="seconds"),
        }


def write_results(path: Path, results: Sequence[Result], environment: Environment) -> None:
    """Write one row for each result, replacing the file as a whole or not at all.

    Raises:
        ValueError: there is nothing to write.
        OSError: the file cannot be written.
    """
    if not results:
        raise ValueError("there are no results to write.")
    date = datetime.now(UTC)
    rows = [result.row(environment, date) for result in results]
    with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def with_ratios(
    names: Sequence[str], baseline: str, timings: Mapping[str, Timing]
) -> dict[str, tuple[Timing | None, float | None]]:
    """For each name its samples, and the baseline's p50 over its own."""
    base = timings.get(baseline)
    return {
        name: (
            timings.get(name),
            None if base is None or name not in timings else base.p50 / timings[name].p50,
        )
        for name in names
    }


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that one call takes beyond what was there before it.

    On CUDA what the caching allocator has handed out. On Linux CPUs the high-water mark of the process's resident
    memory, set back before the call: kernels' own scratch is in it, and so is what the C library keeps for later.

    Args:
        call: what to run, once; it should have run before, so that nothing is loaded or compiled.
        device: where it runs.

    Returns:
        Bytes, or None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # pages that earlier calls left behind would be taken again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        after = _resident("VmHWM")
    except OSError:
        return None
    return None if before is None or after is None else max(after - before, 0)


def _resident(key: str) -> int | None:
    match = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match.group(1)) << 10 if match else None


# --- Attention --------------------------------------------------------------------------------------------------------


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
    """The backend of scaled dot-product attention that a call uses: ``flash``, ``efficient``, ``cudnn``, ``math``.

    Args:
        call: what to run, once.

    Returns:
        The backends, joined with ``+`` if there are several; ``"math"`` where the whole matrix of weights is made, by
        PyTorch or by the network itself; ``"none"`` without attention.

    Example:
        >>> import torch
        >>> attention_backend(lambda: torch.ones(2, 2).relu())
        'none'
    """
    with _Operators() as operators:
        call()
    found = []
    for name in sorted(operators.seen):
        match = re.fullmatch(r"aten::_scaled_dot_product_(?:fused_)?(\w+?)_attention(_for_cpu|_overrideable)?", name)
        if match:
            found.append(match.group(1))
    # The matrix of weights itself: a softmax between two products. A softmax alone may be of taps.
    if operators.seen & {"aten::_softmax", "aten::_safe_softmax"} and operators.seen & {"aten::bmm", "aten::baddbmm"}:
        found.append("math")
    return "+".join(dict.fromkeys(found)) or NO_ATTENTION


# --- Growth -----------------------------------------------------------------------------------------------------------


def fitted_exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """The exponent p of ``time = c size^p``, by least squares on the logarithms; None for fewer than two sizes.

    Example:
        >>> fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0])
        2.0
    """
    if len(sizes) < 2 or len(set(sizes)) < 2:
        return None
    xs, ys = [math.log(s) for s in sizes], [math.log(t) for t in times]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return round(sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread, 6)
