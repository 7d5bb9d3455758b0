"""Models side by side: what is checked, what is measured, what is skipped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gspn.bench import models

QUICK = {"repeats": 1, "min_time": 0.0}


@pytest.mark.parametrize("mode", models.MODES)
def test_models_are_measured(mode, tmp_path):
    problem = models.ModelsProblem(mode=mode)
    names = ["gspn_pico", "vit_tiny_patch16_224"]
    results = models.measure_models(problem, names, [64, 32], **QUICK)
    assert [(r.height, r.name) for r in results] == [(size, name) for size in (32, 64) for name in names]
    assert all(r.timing is not None and r.images_per_second for r in results)
    assert [r.ratio for r in results if r.name == "gspn_pico"] == [1.0, 1.0]
    assert {r.details["attention"] for r in results if r.name == "gspn_pico"} == {"none"}
    assert all(r.details["attention"] != "none" for r in results if r.name != "gspn_pico")
    assert results[2].details["macs"] > 3 * results[0].details["macs"]
    if mode == "inference":
        pytest.importorskip("matplotlib")
        from gspn._figures import save_figure
        from gspn.bench.report import plot_models

        save_figure(plot_models(results, "a", "b"), tmp_path / "models.png", dpi=50)


def test_swin_is_made_for_the_size():
    model = models.ModelsProblem().model("swin_tiny_patch4_window7_224", 64).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_model_that_does_not_fit_into_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(models, "free_memory", lambda device: 100 << 20)
    monkeypatch.setattr(models, "peak_memory", lambda call, device: 40 << 20)
    small, large = models.measure_models(models.ModelsProblem(), ["gspn_pico"], [16, 32], **QUICK)
    assert small.timing is not None
    assert large.timing is None
    assert "0.2 GiB needed, going by 16 x 16; 0.1 GiB free" in large.skipped
    assert large.ratio is None


def test_a_model_that_is_not_finite_or_not_the_same_twice_is_refused(monkeypatch):
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


def test_wrong_names():
    with pytest.raises(ValueError, match="baseline='swin'"):
        models.measure_models(models.ModelsProblem(), ["gspn_pico"], [16], baseline="swin")
    with pytest.raises(ValueError, match="'gspn_gigantic'"):
        models.measure_models(models.ModelsProblem(), ["gspn_gigantic"], [16])
