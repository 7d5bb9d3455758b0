"""The clock, the samples, the memory of a call, and the copy bandwidth."""

from __future__ import annotations

import gc

import pytest
import torch

from gspn.bench import timing
from gspn.bench.timing import Candidate, Timing, copies, freed_pages_kept, peak_memory, time_interleaved

CPU = torch.device("cpu")


def test_quantile_interpolates_between_samples():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert [timing.quantile(q) for q in (0, 0.5, 1)] == [1, 3, 5]
    assert timing.quantile(0.2) == pytest.approx(1.8)
    assert Timing((7.0,)).quantile(0.8) == 7


class FakeClock:
    """Runs each call and says it took what the test wants."""

    def __init__(self, durations: dict[str, float], order: list[str]) -> None:
        self.durations, self.order = durations, order

    def __call__(self, call) -> float:
        name = call()
        self.order.append(name)
        return self.durations[name]


@pytest.fixture
def fake_clock(monkeypatch):
    def install(**durations: float) -> list[str]:
        order: list[str] = []
        monkeypatch.setattr(timing, "Stopwatch", lambda device: FakeClock(durations, order))
        return order

    return install


def test_candidates_take_turns_and_slow_ones_are_spread_over_the_run(fake_clock):
    order = fake_clock(fast=10.0, slow=1000.0)
    steps = []
    candidates = [Candidate("fast", lambda: "fast"), Candidate("slow", lambda: "slow", max_repeats=2)]
    timings = time_interleaved(candidates, CPU, repeats=4, min_time=0.08, progress=lambda *at: steps.append(at))
    assert len(timings["fast"].samples_ms) == 8  # 80 ms in calls of 10 ms
    assert len(timings["slow"].samples_ms) == 2
    warm_up = 3  # two calls of the fast one, one of the slow one; a third is not timed
    assert order[warm_up:] == ["fast"] * 4 + ["slow"] + ["fast"] * 4 + ["slow"]
    assert steps[0] == (0, 10)
    assert steps[-1] == (10, 10)


def test_repeats_are_the_fewest_samples(fake_clock):
    fake_clock(one=100.0)
    timings = time_interleaved([Candidate("one", lambda: "one")], CPU, repeats=7, min_time=0.0)
    assert timings["one"].samples_ms == (100.0,) * 7
    assert timings["one"].p50 == 100


def test_a_clock_that_reads_zero_ends(fake_clock):
    fake_clock(one=0.0)
    timings = time_interleaved([Candidate("one", lambda: "one")], CPU, repeats=2, min_time=1.0)
    assert len(timings["one"].samples_ms) == 200


def test_refuses_equal_names_and_no_repeats():
    one = Candidate("one", lambda: None)
    with pytest.raises(ValueError, match="share a name"):
        time_interleaved([one, one], CPU)
    with pytest.raises(ValueError, match="repeats=0"):
        time_interleaved([one], CPU, repeats=0)


def test_a_failing_call_leaves_garbage_collection_on():
    calls = iter([None, None, None])

    with pytest.raises(StopIteration):
        time_interleaved([Candidate("one", lambda: next(calls))], CPU, repeats=5, min_time=0.0)
    assert gc.isenabled()


@pytest.mark.parametrize("traffic", [1, 8, 100_000, 1 << 20])
def test_copies_copy_everything(traffic):
    made = copies(traffic, CPU)
    assert made.traffic >= 8
    assert abs(made.traffic - traffic) <= 8
    for candidate in made.candidates:
        made.dst.zero_()
        candidate.call()
        assert bool((made.dst == made.src).all()), candidate.name


def test_the_best_copy_counts():
    made = copies(8000, CPU)
    first, second = (c.name for c in made.candidates)
    timings = {first: Timing((2.0,)), second: Timing((1.0, 1.0, 9.0))}
    name, gbs = made.best(timings)
    assert second.endswith(name)
    assert gbs == pytest.approx(8000 / 1e-3 / 1e9)


def test_the_memory_of_a_call_is_what_it_allocates():
    peak = peak_memory(lambda: torch.ones(16 << 20).add_(1), CPU)
    if peak is None:
        pytest.skip("the system does not report a process's high-water mark")
    assert peak == pytest.approx(64 << 20, rel=0.1)


def test_pages_are_given_back_afterwards():
    with freed_pages_kept(1 << 20) as kept:
        assert isinstance(kept, bool)
        torch.ones(1 << 20)
    torch.ones(1 << 20)
