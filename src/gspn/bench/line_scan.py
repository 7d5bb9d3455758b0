"""``line_scan`` measured: its cases, the check before it, its candidates and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import gspn
from gspn.ops import Direction
from gspn.ops.directions import scan_axes

from .accuracy_check import Figure, compare
from .bandwidth import copies
from .report import Measurement
from .timing import Candidate, time_interleaved

MODES = ("forward", "backward")
LOOP = "reference"
"""The implementation that is the baseline: the specification's loop over lines."""
LINE_PER_LAUNCH = "line-per-launch"
"""The other baseline, on CUDA: one kernel launch a line, as GSPN-1 does."""

_BASELINE_SAMPLES = 3
_CHECK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Problem:
    """One call of ``line_scan``: everything but the numbers and the implementation."""

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
            made = torch.randn(
                batch, channels, self.height, self.width, generator=generator, device=self.device, dtype=torch.float32
            )
            return made.to(self.dtype).contiguous(memory_format=self.memory_format)

        # As a projection makes them: the maps of all taps are channels of one tensor, in its layout.
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
        """The same problem, small enough to be checked: odd and unequal height and width, all else kept if it can be.

        Frames stay as large as a budget of elements allows: batch entries, groups and the channels of a group are given
        up first, then height and width. Of a segmented scan two segments and a part of one remain.
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
        segment = self.segment
        lines = height if scan_axes(self.direction).line == -2 else width
        if segment is not None and self.segments > 1:
            segment = min(segment, max(2, (lines - 1) // 2))
        return replace(
            self, batch=batch, channels=groups * shared, groups=groups, height=height, width=width, segment=segment
        )

    @property
    def segments(self) -> int:
        """How many times the recurrence starts."""
        lines = self.height if scan_axes(self.direction).line == -2 else self.width
        return 1 if self.segment is None else -(-lines // self.segment)

    def shape(self) -> dict[str, int | None]:
        """The columns that tell this problem's shape in a report."""
        return {
            "batch": self.batch,
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "groups": self.groups,
            "segment": self.segment,
        }


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


def check(problem: Problem, impls: Sequence[str], modes: Sequence[str] = MODES) -> dict[str, list[Figure]]:
    """Hold implementations against the specification in float64 on the reduced problem.

    Args:
        problem: what is to be timed.
        impls: names of implementations, or :data:`LINE_PER_LAUNCH`, which has a forward alone.
        modes: ``"backward"`` adds the gradients of x, taps and lam to the output h.

    Returns:
        For each implementation its figures; it may be timed only if all of them are ``ok``.
    """
    small = problem.reduced()
    tensors = small.tensors(seed=1)
    gradients = "backward" in modes
    exact = _results(small, tensors.double(), LOOP, gradients)
    plain = _results(small, tensors, LOOP, gradients)
    figures = {}
    for impl in impls:
        if impl == LINE_PER_LAUNCH:
            results = {"h": _line_per_launch(tensors, small.direction, small.segment)()}
        else:
            results = _results(small, tensors, impl, gradients)
        figures[impl] = compare(results, plain, exact)
    return figures


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
        return "it keeps its state in the tensors' dtype, as GSPN-1 does, and only float32 passes the check so."
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
    repeats: int = 10,
    min_time: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Time implementations and baselines side by side in one run; :func:`check` comes before.

    Forward is :func:`gspn.line_scan` without a graph; backward is the operator for all three gradients, alone. All
    directions read the same tensors, which are stable in each of them.

    Args:
        problem: what to time; its own direction does not matter.
        directions: the directions to time it in.
        impls: names of implementations that can run it.
        modes: of :data:`MODES`.
        baselines: whether to time the slow baselines too: the loop, and on CUDA one launch a line.
        repeats: see :func:`~gspn.bench.timing.time_interleaved`; baselines take at least three samples.
        min_time: likewise.
        progress: likewise.

    Returns:
        A measurement for each mode, direction and implementation, in this order, baselines last.
    """
    tensors = problem.tensors()
    h = torch.zeros_like(tensors.x)  # what a backward reads does not change what it does
    timed: list[tuple[str, int | None]] = [(name, None) for name in impls]
    if baselines and LOOP not in impls:
        timed.append((LOOP, _BASELINE_SAMPLES))
    if baselines and why_no_line_per_launch(problem) is None:
        timed.append((LINE_PER_LAUNCH, _BASELINE_SAMPLES))
    cases: list[tuple[str, Direction, str, int | None]] = [
        (mode, direction, name, least)
        for mode in modes
        for direction in directions
        for name, least in timed
        if mode == "forward" or name != LINE_PER_LAUNCH
    ]

    ceiling = copies(problem.traffic("forward"), problem.device)
    with torch.no_grad():
        candidates = [
            Candidate(f"{name} {mode} {direction}", _call(problem, tensors, h, name, mode, direction), least)
            for mode, direction, name, least in cases
        ]
        timings = time_interleaved(
            [*ceiling.candidates, *candidates], problem.device, repeats=repeats, min_time=min_time, progress=progress
        )

    copy_name, copy_gbs = ceiling.best(timings)
    measurements = []
    for mode, direction, name, _ in cases:
        loop = timings.get(f"{LOOP} {mode} {direction}")
        measurements.append(
            Measurement(
                op="line_scan",
                impl=name,
                mode=mode,
                direction=direction,
                dtype=str(problem.dtype).removeprefix("torch."),
                shape=problem.shape(),
                memory_format=str(problem.memory_format).removeprefix("torch.").removesuffix("_format"),
                timing=timings[f"{name} {mode} {direction}"],
                traffic=problem.traffic(mode),
                copy=copy_name,
                copy_gbs=copy_gbs,
                loop_ms=None if loop is None else loop.p50,
            )
        )
    return measurements


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
