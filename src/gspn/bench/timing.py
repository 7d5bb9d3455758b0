"""Time and memory of a call, measured in the same way for every candidate; and how fast the machine copies."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .environment import last_level_cache

# Quantiles gain nothing beyond; a tiny call would be repeated forever to fill a time.
_MOST_SAMPLES = 200
# A call that takes longer has warmed up the caches and the allocator by itself.
_SLOW_CALL_MS = 500.0


@dataclass(frozen=True)
class Candidate:
    """One thing to time."""

    name: str
    call: Callable[[], object]
    """The call to time. Its result is dropped inside the timed region, as a caller's next step would."""
    max_repeats: int | None = None
    """A limit on the caller's ``repeats``, for a candidate that is known to be slow."""


@dataclass(frozen=True)
class Timing:
    """The samples of one candidate."""

    samples_ms: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The q-quantile of the samples in milliseconds, between neighbouring samples linearly."""
        return torch.tensor(self.samples_ms, dtype=torch.float64).quantile(q).item()

    @property
    def p50(self) -> float:
        """The median in milliseconds."""
        return self.quantile(0.5)


class Stopwatch:
    """Times single calls on one device, each from caches that hold nothing of it unless ``evict`` is false.

    Before each call a buffer larger than the last-level cache is read, not written: dirty lines would be written back
    while the call is timed. On CUDA that read also keeps the device busy until the host has queued the call and both
    events, so that a short kernel's time is its own and not the host's.

    Args:
        device: the device that the calls run on.
        processor_time: whether to count the processor time of the process instead of the time that passes, on a CPU
            that is shared with others. With several threads it is the sum of theirs.
        evict: whether caches are emptied of the call on a CPU.
    """

    def __init__(self, device: torch.device, *, processor_time: bool = False, evict: bool = True) -> None:
        self.device = device
        self._now = time.process_time if processor_time else time.perf_counter
        size = 2 * last_level_cache(device) if evict else 0
        if device.type == "cuda":
            size = max(size, 512 << 20)
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)
        self._evict = torch.zeros(min(size, 1 << 30) // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """The time of one call, in milliseconds."""
        self._evict.sum()
        if self.device.type != "cuda":
            begin = self._now()
            call()
            return (self._now() - begin) * 1e3
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


def time_interleaved(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    repeats: int = 10,
    min_time: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time all candidates in one run, in turns, so that a drift of the machine affects all of them alike.

    Each candidate is warmed up first, and the time of its warm-up decides the number of its samples. A candidate with
    fewer samples than others sits out some rounds, evenly spread over the whole run.

    Args:
        candidates: the calls to time; their names must differ.
        device: the device that they run on.
        repeats: the fewest samples of each candidate; its own ``max_repeats`` may be lower.
        min_time: the least time in seconds that the samples of each add up to.
        progress: called with (samples taken, samples planned) before the first sample and after each.

    Returns:
        The samples of each candidate, by name.

    Raises:
        ValueError: two candidates have the same name, or ``repeats`` is below 1.
    """
    if len({c.name for c in candidates}) != len(candidates):
        raise ValueError(f"candidates share a name: {[c.name for c in candidates]}.")
    if repeats < 1:
        raise ValueError(f"{repeats=} is below 1.")
    with _current(device):
        clock = Stopwatch(device)
        counts: list[int] = []
        for candidate in candidates:
            estimate = clock(candidate.call)  # may compile, load a library or fault pages in
            if estimate < _SLOW_CALL_MS:
                candidate.call()
                estimate = clock(candidate.call)
            least = repeats if candidate.max_repeats is None else min(repeats, candidate.max_repeats)
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
    return {c.name: Timing(tuple(s)) for c, s in zip(candidates, samples, strict=True)}


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
    """Keep the memory pages of large freed CPU tensors, so that calls do not pay for page faults in their outputs.

    The GNU C library takes large allocations from the kernel and gives them back at once. Each call would then pay a
    page fault for every 4 KiB that it writes, which can cost many times the kernel under test. CUDA's caching allocator
    and the usual allocators of servers (jemalloc, tcmalloc) keep pages. This makes the GNU allocator do the same and
    restores its defaults afterwards; with another C library it changes nothing.

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


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that one call takes beyond what was allocated before it.

    On CUDA this counts what the caching allocator has handed out. On Linux CPUs it is the high-water mark of the
    process's resident memory, reset before the call; it includes the scratch memory of kernels and what the C library
    keeps for later.

    Args:
        call: is run once; run it before, so that nothing is loaded or compiled now.
        device: the device that it runs on.

    Returns:
        Bytes, or None where the system does not report them.
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


# --- Copy bandwidth ---------------------------------------------------------------------------------------------------

_PREFIX = "copy: "
_PAGE = 4096


@dataclass(frozen=True)
class Copies:
    """Ways to copy one buffer to another: the fastest is the ceiling of an operator that is bound by memory."""

    src: Tensor
    dst: Tensor
    candidates: tuple[Candidate, ...]

    @property
    def traffic(self) -> int:
        """Bytes read plus bytes written by one copy."""
        return self.src.nbytes + self.dst.nbytes

    def best(self, timings: Mapping[str, Timing]) -> tuple[str, float]:
        """The name of the fastest copy and its GB/s (10^9 bytes, read plus written)."""
        fastest = min(self.candidates, key=lambda c: timings[c.name].p50)
        return fastest.name.removeprefix(_PREFIX), self.traffic / timings[fastest.name].p50 / 1e6


def copies(traffic: int, device: torch.device) -> Copies:
    """Candidates that read half of ``traffic`` bytes and write the other half.

    The first is ``dst.copy_(src)``, which is not always the fastest. The second is, on a CPU, a memmove split over
    PyTorch's threads, which the C library may do with streaming stores, and on CUDA an element-wise kernel instead of
    the copy engine.
    """
    count = max(traffic // 8, 1)
    src = torch.ones(count, device=device)
    dst = torch.zeros_like(src)  # written here, so that no copy pays for its first touch
    candidates = [Candidate(f"{_PREFIX}torch copy_", lambda: dst.copy_(src))]
    if device.type == "cuda":
        candidates.append(Candidate(f"{_PREFIX}torch neg", lambda: torch.neg(src, out=dst)))
    else:
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(threads)
        share = -(-src.nbytes // threads)
        share += -share % _PAGE

        def memmove() -> None:
            # ctypes lets go of the interpreter lock while it copies.
            parts = [
                pool.submit(ctypes.memmove, dst.data_ptr() + at, src.data_ptr() + at, min(share, src.nbytes - at))
                for at in range(0, src.nbytes, share)
            ]
            for part in parts:
                part.result()

        candidates.append(Candidate(f"{_PREFIX}memmove, {threads} threads", memmove))
    return Copies(src, dst, tuple(candidates))
