"""Clocks, samples and quantiles: how a call's time is taken, the same way for every operator and every candidate."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .environment import last_level_cache

# Quantiles gain nothing beyond; a tiny call would be repeated forever to fill a time.
_MOST_SAMPLES = 200
# Above this a call has filled the caches and settled the allocator by itself: it is not warmed up a second time.
_SLOW_CALL_MS = 500.0


@dataclass(frozen=True)
class Candidate:
    """One thing to time."""

    name: str
    call: Callable[[], object]
    """What is timed. Its result is dropped inside the timed region, as a caller's next step would."""
    least: int | None = None
    """The fewest samples to take where the caller's ``repeats`` is too many, for what is known to be slow."""


@dataclass(frozen=True)
class Timing:
    """The samples of one candidate."""

    samples_ms: tuple[float, ...]
    peak_bytes: int | None
    """Most memory one call had allocated at a time beyond what was there before; None where it cannot be measured."""

    def quantile(self, q: float) -> float:
        """The q-quantile of the samples in milliseconds, between neighbouring samples linearly."""
        return quantile(self.samples_ms, q)

    @property
    def p50(self) -> float:
        """The median in milliseconds."""
        return self.quantile(0.5)


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile, ``0 <= q <= 1``, interpolated linearly between the two nearest samples.

    Raises:
        ValueError: there are no samples, or ``q`` is outside 0 to 1.

    Example:
        >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5)
        2.5
    """
    if not samples:
        raise ValueError("a quantile needs at least one sample.")
    if not 0 <= q <= 1:
        raise ValueError(f"{q=} is outside 0 to 1.")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Stopwatch:
    """Times single calls on one device, each from caches that hold nothing of it.

    Before each call a buffer larger than the last-level cache is read, not written: dirty lines would be written back
    while the call is timed. On CUDA that read also keeps the device busy until the host has queued the call and both
    events, so that a short kernel's time is its own and not the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2 * last_level_cache(device)
        if device.type == "cuda":
            size = max(size, 512 << 20)
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)
        self._evict = torch.zeros(min(size, 1 << 30) // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """The time of one call, in milliseconds."""
        self._evict.sum()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def peak(self, call: Callable[[], object]) -> int | None:
        """Most bytes that ``call`` has allocated at a time; None where the allocator does not tell."""
        if self.device.type != "cuda":
            call()
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def time_interleaved(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    repeats: int = 10,
    min_time: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time every candidate in one run, taking turns, so that a drift of the machine hits all of them alike.

    Each candidate is warmed up first, which also says how long it takes; the number of its samples follows from that.
    Those with fewer samples than others sit out some rounds, evenly spread over the whole run.

    Args:
        candidates: what to time; names must differ.
        device: where they run.
        repeats: the fewest samples of each, unless the candidate asks for fewer.
        min_time: the least time in seconds that the samples of each add up to.
        progress: called with (samples taken, samples planned) once the plan stands and after each sample.

    Returns:
        For each candidate's name its samples.

    Raises:
        ValueError: two candidates of one name, or ``repeats`` below 1.
    """
    if len({c.name for c in candidates}) != len(candidates):
        raise ValueError(f"candidates share a name: {[c.name for c in candidates]}.")
    if repeats < 1:
        raise ValueError(f"{repeats=} is below 1.")
    with _current(device):
        clock = Stopwatch(device)
        counts: list[int] = []
        peaks: list[int | None] = []
        for candidate in candidates:
            first = clock(candidate.call)  # may compile, load a library or fault pages in
            peaks.append(clock.peak(candidate.call) if first < _SLOW_CALL_MS or device.type == "cuda" else None)
            estimate = clock(candidate.call) if first < _SLOW_CALL_MS else first
            least = repeats if candidate.least is None else min(repeats, candidate.least)
            counts.append(min(max(least, math.ceil(min_time * 1e3 / max(estimate, 1e-6))), max(_MOST_SAMPLES, least)))

    samples: list[list[float]] = [[] for _ in candidates]
    rounds, total, done = max(counts, default=0), sum(counts), 0
    if progress is not None:
        progress(done, total)
    with _no_garbage_collection(), _current(device):
        for turn in range(rounds):
            for i, candidate in enumerate(candidates):
                if (turn + 1) * counts[i] // rounds == turn * counts[i] // rounds:
                    continue
                samples[i].append(clock(candidate.call))
                done += 1
                if progress is not None:
                    progress(done, total)
    return {c.name: Timing(tuple(s), p) for c, s, p in zip(candidates, samples, peaks, strict=True)}


def _current(device: torch.device) -> AbstractContextManager[object]:
    """CUDA events are recorded on the current device's stream: make it the one that computes."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_THRESHOLD_DEFAULT, _MMAP_MAX_DEFAULT = 128 * 1024, 65536


@contextmanager
def freed_pages_kept(reserve: int) -> Iterator[bool]:
    """While it lasts, large freed CPU tensors keep their pages, so that a call does not fault its outputs in anew.

    The GNU C library takes large allocations from the kernel and gives them back at once; each call would then pay a
    page fault for every 4 KiB it writes, which can cost many times the kernel under test. CUDA's caching allocator and
    the allocators usual in servers (jemalloc, tcmalloc) keep pages. This makes the GNU allocator do the same and sets
    its defaults again afterwards; with another C library it changes nothing.

    Args:
        reserve: bytes to have ready from the start, about twice what the largest call allocates.

    Yields:
        Whether pages are kept.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    kept = libc is not None and bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
    try:
        if kept and reserve:
            torch.empty(reserve, dtype=torch.uint8).fill_(0)  # touched once, then free for every call to take from
        yield kept
    finally:
        if libc is not None:
            libc.mallopt(_M_MMAP_MAX, _MMAP_MAX_DEFAULT)
            libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_DEFAULT)
            libc.malloc_trim(0)
