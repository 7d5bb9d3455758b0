"""Candidates side by side on maps that grow until a call takes too long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from .comparison import Result, attention_backend, fitted_exponent, peak_memory, with_ratios
from .timing import Candidate, time_interleaved

# An exponent is that of large maps: on small ones the calls themselves, and caches, hide it.
FITTED = 4


def measure_growing(
    bench: str,
    names: Sequence[str],
    sides: Sequence[int],
    calls_at: Callable[[int, Sequence[str]], Mapping[str, Callable[[], object]]],
    macs_at: Callable[[str, int], int | None],
    *,
    mode: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    baseline: str,
    params: Mapping[str, int] | None = None,
    slowest_ms: float = 1000.0,
    repeats: int = 5,
    min_time: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Time the candidates at each size in turns. One drops out before the size at which a call would take too long.

    Args:
        bench: what the results are of.
        names: the candidates.
        sides: H and W of the maps.
        calls_at: (side, names) to what to time for each of them.
        macs_at: (name, side) to multiply-adds of one map, or None.
        mode: as the results state it.
        batch: likewise.
        dtype: likewise.
        device: where the calls run.
        baseline: the candidate that ratios are to.
        params: parameters of each candidate.
        slowest_ms: the longest call to time, going by how a candidate's time grew last.
        repeats: see :func:`~gspn.bench.timing.time_interleaved`.
        min_time: likewise.
        progress: called with (sizes done, sizes planned).

    Returns:
        A result for each size and candidate, in this order; of one that dropped out the first is there, with the
        reason.
    """
    results: list[Result] = []
    out: set[str] = set()
    for done, side in enumerate(sorted(sides)):
        if progress is not None:
            progress(done, len(sides))
        skipped = {}
        for name in names:
            expected = _expected_ms([r for r in results if r.name == name], side)
            if name not in out and expected is not None and expected > slowest_ms:
                skipped[name] = f"a call would take about {expected:.0f} ms, more than {slowest_ms:.0f}"
        calls = calls_at(side, [name for name in names if name not in out and name not in skipped])
        timings = time_interleaved(
            [Candidate(name, call) for name, call in calls.items()], device, repeats=repeats, min_time=min_time
        )
        found = with_ratios(names, baseline, timings)
        for name in names:
            if name in out:
                continue
            timing, ratio = found[name]
            results.append(
                Result(
                    bench=bench,
                    name=name,
                    mode=mode,
                    batch=batch,
                    height=side,
                    width=side,
                    dtype=str(dtype).removeprefix("torch."),
                    params=(params or {}).get(name, 0),
                    macs=macs_at(name, side),
                    attention=attention_backend(calls[name]) if name in calls else "",
                    baseline=baseline,
                    timing=timing,
                    peak_bytes=peak_memory(calls[name], device) if name in calls else None,
                    ratio=ratio,
                    skipped=skipped.get(name, ""),
                )
            )
        out |= set(skipped)
    if progress is not None:
        progress(len(sides), len(sides))
    return results


def exponents(results: Sequence[Result], last: int | None = FITTED) -> dict[str, float]:
    """For each candidate, p of ``time ~ pixels^p``, fitted over its ``last`` largest maps, or all of them."""
    fitted = {}
    for name in dict.fromkeys(result.name for result in results):
        own = [r for r in results if r.name == name and r.timing is not None]
        own = own if last is None else own[-last:]
        p = fitted_exponent([r.height * r.width for r in own], [r.timing.p50 for r in own if r.timing is not None])
        if p is not None:
            fitted[name] = p
    return fitted


def _expected_ms(before: Sequence[Result], side: int) -> float | None:
    timed = [(r.height * r.width, r.timing.p50) for r in before if r.timing is not None][-2:]
    if not timed:
        return None
    grown = fitted_exponent([size for size, _ in timed], [ms for _, ms in timed])
    # Never less than linear: a map twice as large is not free because small ones were.
    return timed[-1][1] * (side * side / timed[-1][0]) ** max(grown or 1.0, 1.0)
