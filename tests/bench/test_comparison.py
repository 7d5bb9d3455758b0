"""Mixers and networks side by side: what is checked, what is measured, what is skipped."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gspn.bench import comparison, environment, mixer, models
from gspn.bench import size_sweep as growing
from gspn.bench.comparison import attention_backend, fitted_exponent, peak_memory, write_results
from gspn.bench.timing import Timing
from gspn.nn import GSPNMixer

CPU = torch.device("cpu")
QUICK = {"repeats": 1, "min_time": 0.0}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_exponent_is_fitted():
    assert fitted_exponent([100, 400, 1600], [1.0, 4.0, 16.0]) == pytest.approx(1)
    assert fitted_exponent([4, 4], [1.0, 2.0]) is None
    assert fitted_exponent([4], [1.0]) is None


def test_the_memory_of_a_call_is_what_it_allocates():
    peak = peak_memory(lambda: torch.ones(16 << 20).add_(1), CPU)
    if peak is None:
        pytest.skip("the system does not tell a process its high-water mark")
    assert peak == pytest.approx(64 << 20, rel=0.1)


def test_the_backend_of_attention_is_named():
    q = torch.randn(1, 2, 300, 32)
    assert "flash" in attention_backend(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention_backend(lambda: (q @ q.mT).softmax(-1) @ q) == "math"
    with torch.inference_mode():
        assert attention_backend(lambda: (q @ q.mT).softmax(-1) @ q) == "math"
        assert "flash" in attention_backend(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention_backend(lambda: (q + 1).softmax(-1)) == comparison.NO_ATTENTION


@pytest.mark.parametrize("mode", mixer.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mixer_passes_its_check(mode, dtype):
    found = mixer.check_mixers(mixer.MixerProblem(dim=32, dtype=dtype, mode=mode))
    assert tuple(found) == mixer.CANDIDATES
    for name, figures in found.items():
        assert [f.name for f in figures] == (["y"] if mode == "forward" else ["y", "dx"])
        assert all(f.ok for f in figures), (name, figures)


def test_a_wrong_mixer_does_not(monkeypatch):
    forward = GSPNMixer.forward

    def wrong(self, x):
        return forward(self, x) * (1 if self.gspn.impl == "reference" else 1.001)

    monkeypatch.setattr(GSPNMixer, "forward", wrong)
    found = mixer.check_mixers(mixer.MixerProblem(dim=32), [mixer.SHARED, mixer.ATTENTION])
    assert [all(f.ok for f in figures) for figures in found.values()] == [False, True]


def test_mixers_are_measured_until_they_take_too_long(tmp_path, monkeypatch):
    def timed(candidates, device, **options):
        # Attention takes a millisecond for 8 x 8 and grows with the square, the others linearly.
        return {c.name: Timing((PACE[c.name] * clock["side"] ** POWER[c.name],), None) for c in candidates}

    PACE = {mixer.SHARED: 1 / 64, mixer.ATTENTION: 1 / 4096}
    POWER = {mixer.SHARED: 2, mixer.ATTENTION: 4}
    clock = {"side": 0}
    make = mixer.MixerProblem.map

    def noted(self, height, width, seed=0):
        clock["side"] = height
        return make(self, height, width, seed)

    monkeypatch.setattr(growing, "time_interleaved", timed)
    monkeypatch.setattr(mixer.MixerProblem, "map", noted)
    results = mixer.measure_mixers(
        mixer.MixerProblem(dim=16), list(PACE), [16, 8, 32], slowest_ms=100, baseline=mixer.ATTENTION
    )
    assert [(r.height, r.name, r.timing is None) for r in results] == [
        (8, mixer.SHARED, False),
        (8, mixer.ATTENTION, False),
        (16, mixer.SHARED, False),
        (16, mixer.ATTENTION, False),
        (32, mixer.SHARED, False),
        (32, mixer.ATTENTION, True),
    ]
    assert "256 ms" in results[-1].skipped
    assert results[2].ratio == pytest.approx(16 / 4)
    assert mixer.exponents(results) == pytest.approx({mixer.SHARED: 1.0, mixer.ATTENTION: 2.0})
    path = tmp_path / "mixer.csv"
    write_results(path, results, environment.describe(CPU))
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 6
    assert rows[0]["attention"] == "none"
    assert rows[1]["attention"] not in ("", "none")
    assert rows[-1]["p50_ms"] == ""


def test_the_plot_of_mixers(tmp_path):
    pytest.importorskip("matplotlib")
    from gspn._figures import save_figure
    from gspn.bench.comparison_plot import plot_mixers

    results = mixer.measure_mixers(mixer.MixerProblem(dim=16, mode="train"), sides=[4, 6], **QUICK)
    assert all(r.timing is not None and r.macs for r in results)
    save_figure(plot_mixers(results, mixer.exponents(results), "a", "b"), tmp_path / "mixer.png", dpi=50)
    assert (tmp_path / "mixer.png").exists()


@pytest.mark.parametrize("mode", models.MODES)
def test_networks_are_measured(mode, tmp_path):
    problem = models.ModelsProblem(mode=mode)
    names = ["gspn_pico", "vit_tiny_patch16_224"]
    results = models.measure_models(problem, names, [64, 32], **QUICK)
    assert [(r.height, r.name) for r in results] == [(size, name) for size in (32, 64) for name in names]
    assert all(r.timing is not None and r.images_per_second for r in results)
    assert [r.ratio for r in results if r.name == "gspn_pico"] == [1.0, 1.0]
    assert {r.attention for r in results if r.name == "gspn_pico"} == {"none"}
    assert all(r.attention != "none" for r in results if r.name != "gspn_pico")
    assert results[2].macs > 3 * results[0].macs
    if mode == "inference":
        pytest.importorskip("matplotlib")
        from gspn._figures import save_figure
        from gspn.bench.comparison_plot import plot_models

        save_figure(plot_models(results, "a", "b"), tmp_path / "models.png", dpi=50)


def test_swin_is_made_for_the_size():
    model = models.ModelsProblem().model("swin_tiny_patch4_window7_224", 64).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_what_the_memory_would_not_hold_is_skipped(monkeypatch):
    monkeypatch.setattr(models, "free_memory", lambda device: 100 << 20)
    monkeypatch.setattr(models, "peak_memory", lambda call, device: 40 << 20)
    small, large = models.measure_models(models.ModelsProblem(), ["gspn_pico"], [16, 32], **QUICK)
    assert small.timing is not None
    assert large.timing is None
    assert "0.2 GiB needed, going by 16 x 16; 0.1 GiB free" in large.skipped
    assert large.ratio is None


def test_a_network_that_is_not_finite_or_not_the_same_twice_is_refused(monkeypatch):
    assert models.why_not(lambda: torch.tensor([1.0, float("inf")])) == "its results are not finite"
    count = SimpleNamespace(calls=0)

    def differs():
        count.calls += 1
        return torch.tensor([float(count.calls)])

    assert models.why_not(differs) == "two calls differ"
    assert models.why_not(lambda: torch.rand(3)) is None  # seeded
    monkeypatch.setattr(models, "why_not", lambda call, mode: "two calls differ")
    with pytest.raises(models.CheckFailedError, match="gspn_pico at 16 x 16: two calls differ"):
        models.measure_models(models.ModelsProblem(), ["gspn_pico"], [16], **QUICK)


def test_names_that_are_wrong():
    with pytest.raises(ValueError, match="baseline='swin'"):
        models.measure_models(models.ModelsProblem(), ["gspn_pico"], [16], baseline="swin")
    with pytest.raises(ValueError, match="'gspn_gigantic'"):
        models.measure_models(models.ModelsProblem(), ["gspn_gigantic"], [16])
