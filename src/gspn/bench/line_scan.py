"""``line_scan`` beside the copy bandwidth and its baselines: the problem, the check before it, and the measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import gspn
from gspn.ops import Direction
from gspn.ops.directions import scan_axes

from .accuracy_check import Accuracy, compare
from .report import Result
from .timing import Candidate, copies, peak_memory, time_interleaved

MODES = ("forward", "backward")
LOOP = "reference"
"""The implementation that is the baseline: the specification's loop over lines."""
LINE_PER_LAUNCH = "line-per-launch"
"""The other baseline, on CUDA: one kernel launch a line, as in GSPN-1."""
COLUMNS = (
    *("op", "impl", "mode", "direction", "dtype", "batch", "channels", "height", "width", "groups", "segment"),
    *("memory_format", "p20_ms", "p50_ms", "p80_ms", "samples", "bytes", "gbs", "copy", "copy_gbs"),
    *("fraction_of_copy", "speedup_over_loop", "peak_memory_mb", "pages"),
)
"""The measured columns of the CSV."""

_BASELINE_SAMPLES = 3
_CHECK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Problem:
    """One call of ``line_scan``: everything but the values of the tensors and the implementation."""

    batch: int
    channels: int
    groups: int
    height: int
    width: int
    dtype: torch.dtype
    direction: Direction
    segment: int | None
    memory_format: torch.memory_format
    device: torch.device

    @property
    def elements(self) -> int:
        """Elements of ``x``."""
        return self.batch * self.channels * self.height * self.width

    @property
    def tap_elements(self) -> int:
        """Elements of ``taps``: three tensors like ``x`` if each channel has its own, less if groups share them."""
        return 3 * self.batch * self.groups * self.height * self.width

    def traffic(self, mode: str) -> int:
        """Bytes that ``mode`` has to move if each tensor passes the memory once.

        Forward reads x, lam and taps and writes h: six tensors with per-channel taps. Backward reads grad, h, x, lam
        and taps and writes dx, dlam and dtaps: seven and five.
        """
        maps, taps = {"forward": (3, 1), "backward": (6, 2)}[mode]
        return (maps * self.elements + taps * self.tap_elements) * self.dtype.itemsize

    def tensors(self, seed: int = 0) -> Tensors:
        """Random inputs of this problem, with taps that are stable."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(batch: int, channels: int) -> Tensor:
            shape = (batch, channels, self.height, self.width)
            values = torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32)
            return values.to(self.dtype).contiguous(memory_format=self.memory_format)

        # As from a projection: the maps of all taps are channels of one tensor, in its layout.
        logits = normal(self.batch, 3 * self.groups).unflatten(1, (self.groups, 3))
        taps = gspn.stochastic_taps(logits, direction=self.direction)
        layout = torch.empty_like(logits)
        return Tensors(
            x=normal(self.batch, self.channels),
            taps=layout.copy_(taps),
            lam=normal(self.batch, self.channels).sigmoid_(),
            grad=normal(self.batch, self.channels),
        )

    def reduced(self) -> Problem:
        """The same problem, small enough to be checked, with odd and unequal height and width.

        Batch, groups and channels shrink first; height and width then shrink until the elements fit a budget. A scan
        with several segments keeps at least two of them and a part of one.
        """
        groups = min(self.groups, 2)
        shared = min(self.channels // self.groups, 24)
        batch = min(self.batch, 2)
        height, width = self.height | 1, (self.width | 1) + 2
        while batch * groups * shared * height * width > _CHECK_ELEMENTS and max(height, width) > 9:
            if height > width:
                height = (height // 2) | 1
            else:
                width = (width // 2) | 1
            if height == width:
                width += 2
        small = replace(self, batch=batch, channels=groups * shared, groups=groups, height=height, width=width)
        if self.segment is None or self.segments == 1:
            return small
        return replace(small, segment=min(self.segment, max(2, (small.lines - 1) // 2)))

    @property
    def lines(self) -> int:
        """The number of lines of a scan."""
        return self.height if scan_axes(self.direction).line == -2 else self.width

    @property
    def segments(self) -> int:
        """How many times the recurrence starts."""
        return 1 if self.segment is None else -(-self.lines // self.segment)


@dataclass(frozen=True)
class Tensors:
    """The inputs of a problem and the gradient that arrives at its output."""

    x: Tensor
    taps: Tensor
    lam: Tensor
    grad: Tensor

    def double(self) -> Tensors:
        """The same numbers in float64."""
        return Tensors(self.x.double(), self.taps.double(), self.lam.double(), self.grad.double())


def check(problem: Problem, impls: Sequence[str], modes: Sequence[str] = MODES) -> dict[str, list[Accuracy]]:
    """Compare implementations with the specification in float64 on the reduced problem.

    Args:
        problem: the problem to be timed.
        impls: names of implementations, or :data:`LINE_PER_LAUNCH`, which has no backward.
        modes: ``"backward"`` adds the gradients of x, taps and lam to the output h.

    Returns:
        The accuracies of each implementation; time it only if all of them are ``ok``.
    """
    small = problem.reduced()
    tensors = small.tensors(seed=1)
    gradients = "backward" in modes
    exact = _results(small, tensors.double(), LOOP, gradients)
    plain = _results(small, tensors, LOOP, gradients)
    accuracies = {}
    for impl in impls:
        if impl == LINE_PER_LAUNCH:
            results = {"h": _line_per_launch(tensors, small.direction, small.segment)()}
        else:
            results = _results(small, tensors, impl, gradients)
        accuracies[impl] = compare(results, plain, exact)
    return accuracies


def _results(problem: Problem, tensors: Tensors, impl: str, gradients: bool) -> dict[str, Tensor]:
    inputs = {"x": tensors.x, "taps": tensors.taps, "lam": tensors.lam}
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in inputs.items()}
    h = gspn.line_scan(**leaves, direction=problem.direction, segment=problem.segment, impl=impl)
    results = {"h": h.detach()}
    if gradients:
        grads = torch.autograd.grad(h, list(leaves.values()), tensors.grad)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def why_no_line_per_launch(problem: Problem) -> str | None:
    """The reason why the baseline of one launch a line cannot be timed, or None."""
    if problem.device.type != "cuda":
        return "it is a Triton kernel for CUDA devices."
    if problem.dtype != torch.float32:
        return "it keeps its state in the tensors' dtype, as in GSPN-1, and passes the check in float32 alone."
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed."
    return None


def _line_per_launch(tensors: Tensors, direction: Direction, segment: int | None) -> Callable[[], Tensor]:
    from .kernel_per_line_baseline import LinePerLaunch  # imports triton

    return LinePerLaunch(tensors.x, tensors.taps, tensors.lam, direction, segment)


def measure(
    problem: Problem,
    directions: Sequence[Direction],
    impls: Sequence[str],
    modes: Sequence[str] = MODES,
    *,
    baselines: bool = True,
    pages: str = "system",
    repeats: int = 10,
    min_time: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Time implementations and baselines side by side in one run; run :func:`check` before.

    Forward is :func:`gspn.line_scan` without a graph; backward is the operator for all three gradients, alone. All
    directions read the same tensors, which are stable in each of them.

    Args:
        problem: the problem to time; its own direction does not matter.
        directions: the directions to time it in.
        impls: names of implementations that can run it.
        modes: members of :data:`MODES`.
        baselines: whether to time the slow baselines too: the loop, and on CUDA one launch a line.
        pages: the column ``pages``: ``"kept"`` under :func:`~gspn.bench.timing.freed_pages_kept`, else ``"system"``.
        repeats: see :func:`~gspn.bench.timing.time_interleaved`; baselines take at least three samples.
        min_time: see :func:`~gspn.bench.timing.time_interleaved`.
        progress: see :func:`~gspn.bench.timing.time_interleaved`.

    Returns:
        A result for each mode, direction and implementation, in this order, baselines last.
    """
    tensors = problem.tensors()
    h = torch.zeros_like(tensors.x)  # the values that a backward reads do not change its time
    timed: dict[str, int | None] = dict.fromkeys(impls)
    if baselines:
        timed.setdefault(LOOP, _BASELINE_SAMPLES)
        if why_no_line_per_launch(problem) is None:
            timed[LINE_PER_LAUNCH] = _BASELINE_SAMPLES
    cases: list[tuple[str, Direction, str, int | None]] = [
        (mode, direction, name, most)
        for mode in modes
        for direction in directions
        for name, most in timed.items()
        if mode == "forward" or name != LINE_PER_LAUNCH
    ]

    ceiling = copies(problem.traffic("forward"), problem.device)
    with torch.no_grad():
        candidates = [
            Candidate(f"{name} {mode} {direction}", _call(problem, tensors, h, name, mode, direction), most)
            for mode, direction, name, most in cases
        ]
        timings = time_interleaved(
            [*ceiling.candidates, *candidates], problem.device, repeats=repeats, min_time=min_time, progress=progress
        )
        cuda = problem.device.type == "cuda"
        peaks = [peak_memory(candidate.call, problem.device) if cuda else None for candidate in candidates]

    copy_name, copy_gbs = ceiling.best(timings)
    results = []
    for (mode, direction, name, _), candidate, peak in zip(cases, candidates, peaks, strict=True):
        loop, timing = timings.get(f"{LOOP} {mode} {direction}"), timings[candidate.name]
        gbs = problem.traffic(mode) / timing.p50 / 1e6
        # The fraction may pass 1: a copy writes every second byte, a scan fewer.
        details = {
            "op": "line_scan", "impl": name, "direction": direction, "channels": problem.channels,
            "groups": problem.groups, "segment": problem.segment,
            "memory_format": str(problem.memory_format).removeprefix("torch.").removesuffix("_format"),
            "bytes": problem.traffic(mode), "gbs": gbs, "copy": copy_name, "copy_gbs": copy_gbs,
            "fraction_of_copy": gbs / copy_gbs, "speedup_over_loop": None if loop is None else loop.p50 / timing.p50,
            "pages": pages,
        }  # fmt: skip
        results.append(
            Result(
                name=name, mode=mode, batch=problem.batch, height=problem.height, width=problem.width,
                dtype=problem.dtype, timing=timing, baseline=LOOP, baseline_ms=None if loop is None else loop.p50,
                peak_bytes=peak, details=details,
            )
        )  # fmt: skip
    return results


def _call(
    problem: Problem, tensors: Tensors, h: Tensor, impl: str, mode: str, direction: Direction
) -> Callable[[], object]:
    x, taps, lam, segment = tensors.x, tensors.taps, tensors.lam, problem.segment
    if impl == LINE_PER_LAUNCH:
        return _line_per_launch(tensors, direction, segment)
    if mode == "forward":
        return partial(gspn.line_scan, x, taps, lam, direction=direction, segment=segment, impl=impl)
    return partial(
        torch.ops.gspn.line_scan_backward, tensors.grad, h, x, taps, lam, direction, segment, impl, True, True
    )
