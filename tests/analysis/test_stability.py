"""The stability report: right on what is stable, and red on what is not."""

from __future__ import annotations

import csv

import pytest
import torch

import gspn
from gspn.analysis import scan_stability, stability_report, write_stability
from gspn.models import GSPN
from gspn.nn import GSPN2d


def constant_module(segment: int | None = None, **options) -> GSPN2d:
    """One whose input gate is 1 everywhere on an input of ones."""
    module = GSPN2d(2, proxy_dim=1, segment=segment, dtype=torch.float64, **options)
    for parameter, value in ((module.proxy.weight, 0.5), (module.lam_proj, 1.0), (module.tap_proj, 0.3)):
        torch.nn.init.constant_(parameter, value)
    return module


@pytest.mark.parametrize(("segment", "growth"), [(None, {"down": 7, "left": 9}), (4, {"down": 4, "left": 4})])
def test_a_constant_input_uses_the_whole_bound(segment, growth):
    report = scan_stability("gspn", constant_module(segment), torch.ones(1, 2, 7, 9, dtype=torch.float64))
    assert [entry.direction for entry in report] == list(gspn.DIRECTIONS)
    for entry in report:
        assert entry.tap_sum_min == pytest.approx(1)
        assert entry.tap_sum_max == pytest.approx(1)
        assert entry.bound_used == pytest.approx(1)
        assert entry.ok
        if entry.direction in growth:
            assert entry.state_max == pytest.approx(growth[entry.direction])
            assert entry.growth == pytest.approx(growth[entry.direction])
            assert entry.bound_max == pytest.approx(growth[entry.direction])


def test_over_a_normalized_axis_the_state_is_that_of_the_reference():
    for size in (7, 20):
        for entry in scan_stability("gspn", constant_module(reference_lines=5), torch.ones(1, 2, size, size).double()):
            assert entry.ok
            assert entry.state_max == pytest.approx(5) and entry.input_max == pytest.approx(5 / size)


@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"segment": 3}, {"alignment": "official"}])
def test_random_modules_are_stable(options):
    torch.manual_seed(0)
    report = scan_stability("gspn", GSPN2d(8, **options), torch.randn(2, 8, 11, 11))
    assert len(report) == 4
    assert all(entry.ok and entry.float16_finite and entry.state_max < entry.bound_max for entry in report)
    assert all(0 < entry.growth < (options.get("segment") or 11) for entry in report)


def test_a_long_scan_leaves_float16_but_not_its_bound():
    x = torch.full((1, 2, 70, 3), 1000.0, dtype=torch.float64)
    module = constant_module()
    torch.nn.init.constant_(module.lam_proj, 1e-3)  # the proxy is 1000 as well
    down, _, right, _ = scan_stability("gspn", module, x)
    assert down.state_max == pytest.approx(70_000)
    assert not down.float16_finite
    assert down.ok
    assert right.float16_finite


def test_taps_that_do_not_sum_to_one_are_seen(monkeypatch):
    monkeypatch.setattr("gspn.analysis.scans.stochastic_taps", lambda logits, direction: logits.sigmoid())
    entries = scan_stability("gspn", GSPN2d(4), torch.randn(1, 4, 12, 12))
    assert not any(entry.ok for entry in entries)
    assert all(entry.tap_sum_max > 1.1 for entry in entries)


def test_nothing_and_not_a_number():
    zero = scan_stability("gspn", GSPN2d(4), torch.zeros(1, 4, 3, 1))
    assert all(entry.ok and entry.state_max == 0 and entry.bound_used == 0 for entry in zero)
    assert not any(entry.ok for entry in scan_stability("gspn", GSPN2d(4), torch.full((1, 4, 3, 3), float("nan"))))
    with pytest.raises(ValueError, match="at least one pixel"):
        scan_stability("gspn", GSPN2d(4), torch.zeros(0, 4, 3, 3))


def test_a_model_and_its_csv(tmp_path):
    torch.manual_seed(0)
    model = GSPN(dims=(8, 16), depths=(1, 2), segment=(2, None))
    report = stability_report(model, torch.randn(1, 3, 37, 50))
    assert len(report) == 3 * 4
    assert [entry.segment for entry in report] == [2] * 4 + [None] * 8
    assert all(entry.ok for entry in report)
    path = tmp_path / "new" / "stability.csv"
    write_stability(path, report)
    rows = list(csv.DictReader(path.open()))
    assert [row["module"] for row in rows] == [entry.module for entry in report]
    assert {row["ok"] for row in rows} == {"True"}
    assert float(rows[-1]["bound_used"]) == report[-1].bound_used
    with pytest.raises(ValueError, match="of the model are: none"):
        stability_report(torch.nn.ReLU(), torch.zeros(1, 3, 4, 4))
