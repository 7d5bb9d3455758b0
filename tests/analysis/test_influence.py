"""Rows of the affinity, against the explicit matrix and against the module itself."""

from __future__ import annotations

import pytest
import torch

import gspn
from gspn.analysis import affinity_matrix, affinity_rows, image_influence, pixel_influence
from gspn.analysis.scans import choose_scan, find_scans, scans_of
from gspn.models import GSPN
from gspn.nn import GSPN2d

QUERY = (2, 4)


def make(**options) -> tuple[GSPN2d, torch.Tensor]:
    torch.manual_seed(0)
    module = GSPN2d(4, proxy_dim=3, dtype=torch.float64, **options)
    torch.nn.init.normal_(module.merge)
    return module, torch.randn(1, 4, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("segment", [None, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_are_those_of_the_explicit_matrix(groups, segment):
    module, x = make(groups=groups, segment=segment)
    rows, merged = affinity_rows(module, x, QUERY)
    at = QUERY[0] * 6 + QUERY[1]
    total = torch.zeros(4, 5, 6, dtype=torch.float64)
    for scan in scans_of(module, x):
        matrix = affinity_matrix(scan.taps, scan.lam, scan.direction, segment)  # [1, C, N, N]
        expected = (matrix[0, :, at] * scan.u[0].flatten(1)[:, at, None]).unflatten(-1, (5, 6))
        torch.testing.assert_close(rows[scan.direction], expected)
        total += expected
        total[:, QUERY[0], QUERY[1]] += scan.skip[0, :, QUERY[0], QUERY[1]]
        reach = affinity_matrix(scan.taps, None, scan.direction, segment)[0, :, at].mean(0).unflatten(-1, (5, 6))
        torch.testing.assert_close(pixel_influence(module, x, QUERY).reach[scan.direction], reach)
    torch.testing.assert_close(merged, total)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 1, "segment": 2},
        {"skip": False},
        {"directions": ("left", "down")},
        {"alignment": "official"},
        {"reference_lines": 9, "segment": 4},
        {"reference_lines": 9, "alignment": "official"},
    ],
)
def test_a_row_times_the_input_is_the_output(options):
    module, x = make(**options)
    x = x[..., :5]
    for query in ((2, 4), (0, 0)):
        rows, merged = affinity_rows(module, x, query)
        assert tuple(rows) == module.directions
        torch.testing.assert_close((merged * x[0]).sum((1, 2)), module(x)[0, :, query[0], query[1]])


def test_the_summary_is_the_mean_magnitude_and_lines_of_the_reach_sum_to_one():
    module, x = make()
    rows, merged = affinity_rows(module, x, QUERY)
    found = pixel_influence(module, x, QUERY)
    assert found.query == QUERY
    torch.testing.assert_close(found.merged, merged.abs().mean(0))
    for direction, row in rows.items():
        torch.testing.assert_close(found.directions[direction], row.abs().mean(0))
    one = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(found.reach["down"].sum(1), one[:5] * torch.tensor([1, 1, 1, 0, 0]))
    torch.testing.assert_close(found.reach["left"].sum(0), one * torch.tensor([0, 0, 0, 0, 1, 1]))
    assert all((reach >= 0).all() for reach in found.reach.values())


def test_half_precision_and_inference_mode():
    module = GSPN2d(4, reference_lines=3).to(torch.bfloat16)
    with torch.inference_mode():
        found = pixel_influence(module, torch.randn(1, 4, 5, 6).to(torch.bfloat16), (0, 0))
    assert found.merged.dtype == torch.float32
    assert found.merged.isfinite().all()
    assert not found.merged.requires_grad
    assert all(p.grad is None for p in module.parameters())


def test_on_a_image():
    torch.manual_seed(0)
    model = GSPN(dims=(8, 16), depths=(1, 2), drop_path_rate=0.5).train()
    image = torch.randn(1, 3, 24, 40)
    found = image_influence(model, image, (39, 0), stage=1, block=0)
    assert found.name == "stages.1.blocks.0.mixer.gspn"
    assert found.influence.query == (0, 4)
    assert found.influence.merged.shape == (3, 5)
    assert set(found.directions) == set(found.reach) == set(gspn.DIRECTIONS)
    assert all(m.shape == (24, 40) for m in (found.merged, *found.directions.values(), *found.reach.values()))
    assert model.training
    assert model.stages[1].blocks[0].training
    by_name = image_influence(model, image, (39, 0), name=found.name)
    assert torch.equal(by_name.merged, found.merged)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scans_are_chosen_by_stage_and_block():
    model = GSPN(dims=(8, 16), depths=(1, 2))
    assert choose_scan(model) == choose_scan(model, 1, 1) == list(find_scans(model))[-1]
    assert choose_scan(model, 0, -1) == "stages.0.blocks.0.mixer.gspn"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pixel_influence(GSPN2d(4), torch.zeros(2, 4, 5, 5), (0, 0)), r"x.shape=torch.Size\(\[2, 4, 5, 5\]\)"),
        (lambda: pixel_influence(GSPN2d(4), torch.zeros(1, 4, 5, 5), (5, 0)), r"query=\(5, 0\).*5 x 5"),
        (lambda: pixel_influence(GSPN2d(4, alignment="official"), torch.zeros(1, 4, 5, 6), (0, 0)), "H == W"),
        (lambda: choose_scan(GSPN(dims=(8,), depths=(1,)), stage=1), "no stage 1: counted from 0, the last is 0"),
        (lambda: choose_scan(GSPN(dims=(8,), depths=(1,)), block=-2), "no block of stage -1 -2"),
        (lambda: choose_scan(torch.nn.ReLU()), "ReLU has no stages"),
        (
            lambda: image_influence(GSPN(dims=(8,), depths=(1,)), torch.zeros(1, 3, 8, 9), (9, 0)),
            r"point=\(9, 0\).*9 x 8",
        ),
        (
            lambda: image_influence(GSPN(dims=(8,), depths=(1,)), torch.zeros(1, 3, 8, 9), (0, 0), name="gspn"),
            "'gspn'.*stages.0.blocks.0.mixer.gspn",
        ),
        (lambda: image_influence(GSPN(dims=(8,), depths=(1,)), torch.zeros(3, 8, 9), (0, 0)), "one image"),
    ],
)
def test_errors_show_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
