"""From an image and a point to maps and a figure."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from gspn.analysis.explain import explain
from gspn.analysis.loading import LoadedModel, load_model
from gspn.models import GSPN


def small_model(**options) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(GSPN(dims=(8, 16), depths=(1, 1), **options).eval(), "small", "random")


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 31), (300, 7), (1, 1), (50, 50)])
def test_images_of_any_size(height, width):
    found = explain(small_model(), torch.rand(3, height, width), (width - 1, height - 1), size=48, stage=0)
    assert max(found.image.shape) == 48
    assert abs(found.image.shape[1] / found.image.shape[2] - height / width) < 0.2 * max(height / width, 1)
    assert found.affinity.merged.shape == found.image.shape[1:]
    assert all(0 <= at < side for at, side in zip(found.affinity.point, reversed(found.image.shape), strict=False))
    assert len(found.stability) == 2 * 4
    assert found.module.startswith("stage 0, block 0: 12 channels")


def test_the_scan_is_described():
    def described(**options):
        return explain(small_model(**options), torch.rand(3, 32, 48), (0, 0), size=48, stage=1).module

    assert described() == "stage 1, block 0: 24 channels, 4 x 6, global, taps for each channel"
    assert ", segments of 2, normalized to 14 lines, " in described(segment=2, scan={"reference_lines": 14})


@pytest.mark.parametrize("segment", [None, 1])
def test_the_figure_is_drawn(segment, tmp_path):
    pytest.importorskip("matplotlib")
    from gspn._figures import save_figure
    from gspn.analysis.drawing import draw_explanation

    image = torch.rand(3, 45, 80)
    found = explain(small_model(segment=segment), image, (10, 40), size=64)
    figure = draw_explanation(found, image)
    assert len(figure.axes) == 2 + 4 + 1
    save_figure(figure, tmp_path / "out.png", dpi=50)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_one_that_takes_nothing_is_drawn_too():
    pytest.importorskip("matplotlib")
    from gspn.analysis.drawing import draw_explanation

    small = small_model()
    for parameter in small.model.parameters():
        torch.nn.init.zeros_(parameter)
    draw_explanation(explain(small, torch.zeros(3, 16, 16), (0, 0), size=16))


def test_the_seed_is_the_models_own():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_model("gspn_nano.untrained", seed=1)
    assert torch.equal(torch.rand(1), expected)
    second = load_model("gspn_nano.untrained", seed=1)
    assert first.weights == second.weights == "random, seed 1"
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_come_along_are_taken_and_named():
    named = timm.list_pretrained("gspn_pico*")
    if not named:
        pytest.skip("gspn_pico has no weights here")
    assert load_model("gspn_pico").weights == f"pretrained, {named[0].partition('.')[2]}"


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_saved_folder(tmp_path, prefix):
    torch.manual_seed(3)
    saved = timm.create_model("gspn_pico", num_classes=4, in_chans=1, depths=(1, 1, 1))
    save_for_hf(saved, tmp_path, model_args={"in_chans": 1, "depths": [1, 1, 1]}, safe_serialization=True)
    opened = load_model(f"{prefix}{tmp_path}")
    assert opened.weights == f"from {tmp_path}"
    assert opened.name == "gspn_pico"
    assert torch.equal(opened.model.stem.conv1.weight, saved.stem.conv1.weight)
    assert opened.normalize(torch.rand(3, 5, 6)).shape == (1, opened.input_size[0], 5, 6)


def test_errors_show_the_value(tmp_path):
    with pytest.raises(ValueError, match=r"point=\(9, 0\).*9 x 8"):
        explain(small_model(), torch.rand(3, 8, 9), (9, 0))
    with pytest.raises(ValueError, match="size=0"):
        explain(small_model(), torch.rand(3, 8, 9), (0, 0), size=0)
    with pytest.raises(ValueError, match="one image"):
        explain(small_model(), torch.rand(1, 8, 9), (0, 0))
    with pytest.raises(ValueError, match="H == W"):
        explain(small_model(scan={"alignment": "official"}), torch.rand(3, 8, 9), (0, 0))
    with pytest.raises(ValueError, match="did you mean 'gspn_tiny'"):
        load_model("gspn_tiney")
    with pytest.raises(ValueError, match=r"imagenet99.*Leave the tag out"):
        load_model("gspn_tiny.imagenet99")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "none_such"}))
    with pytest.raises(ValueError, match="safe_serialization=True"):
        load_model(str(tmp_path))
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unknown model 'none_such'"):
        load_model(f"local-dir:{tmp_path}")
