"""``gspn dense``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from earth_support import write_packages
from gspn.cli import app
from gspn.data import MapClasses, MapRule, load_map, open_maps

pytest.importorskip("segmentation_models_pytorch", reason="needs gspn[dense]")
from tasks.dense.dense_runs import CLASSES, NUMBERS, TINY, tiny_model, write_shapes


@pytest.fixture(scope="module")
def run():
    patch = pytest.MonkeyPatch()
    patch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)
    yield lambda *arguments: CliRunner().invoke(app, ["dense", *map(str, arguments)])
    patch.undo()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), {"train": 16, "val": 2})


@pytest.fixture(scope="module")
def trained(run, shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "schedule": {"epochs": 1}}))
    result = run("train", "--config", folder / "tiny.yaml", "--root", shapes, "--output", folder / "run", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "best mIoU" in result.output and "test_convnext + FPN" in result.output
    return folder / "run"


def test_evaluate(run, trained, shapes, tmp_path):
    result = run("evaluate", trained, "--data", "folder", "--root", shapes, "--window", 48, "--device", "cpu",
                 "--output", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("mIoU", "by distance", "windows of 48 pixels", "megapixels/s", "MiB", "disc"):
        assert word in result.output
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["images"] == 2 and len(written["scores"]["iou"]) == 3


def test_predict_writes_maps_that_can_be_read_again(run, trained, shapes, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    image = Image.open(shapes / "val" / "images" / "0.png")
    image.resize((150, 90)).save(tmp_path / "in" / "good.png")
    result = run("predict", tmp_path / "in", "--model", trained, "--output", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 1
    assert "bad.png: is not an image" in result.stderr and "good.png" in result.output
    values = load_map(tmp_path / "out" / "good.png", MapRule(MapClasses(tuple(CLASSES.classes))))
    assert values.shape == (90, 150) and set(np.unique(values)) <= {0, 1, 2}
    coloured = np.asarray(Image.open(tmp_path / "out" / "good.png").convert("RGB"))
    written = load_colours(trained)
    assert np.array_equal(coloured, np.array(written, np.uint8)[values.astype(int)])
    overlay = Image.open(tmp_path / "out" / "good.overlay.png")
    assert overlay.size == (150, 90) and Image.open(tmp_path / "out" / "legend.png").width == 300
    result = run("predict", tmp_path / "in" / "good.png", "-m", trained, "-o", tmp_path / "only", "--maps-only",
                 "--window", 0)  # fmt: skip
    assert result.exit_code == 0 and [one.name for one in (tmp_path / "only").iterdir()] == ["good.png"]


def load_colours(folder):
    return json.loads((folder / "best" / "dense.json").read_text())["colours"]


def test_numbers_are_written_as_floats(tmp_path, shapes):
    from gspn.tasks.dense import predict

    [one] = predict([shapes / "val" / "images" / "0.png"], tiny_model(NUMBERS), tmp_path, device="cpu")
    values = load_map(one.map, MapRule(None))
    assert one.map.endswith(".tif") and values.shape == (64, 80) and np.isfinite(values).all()
    assert {path.name for path in tmp_path.iterdir()} == {"0.tif", "0.overlay.png", "legend.png"}


def test_two_images_of_one_name_are_refused(run, trained, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "x.png")
    result = run("predict", tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", "-m", trained, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "would both be written as x" in result.stderr


def test_earth(run, tmp_path, monkeypatch):
    sources = write_packages(tmp_path / "packages")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    result = run("earth", "--output", tmp_path / "earth", "--elevation", sources.elevation)
    assert result.exit_code == 0, result.output
    assert open_maps("earth", "val", root=tmp_path / "earth", target="elevation").unit == "m"
    result = run("earth", "--output", tmp_path / "packages")
    assert result.exit_code == 2 and "holds other files" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "earth_climat"], "did you mean 'earth_climate'"),
        (["train", "--set", "model.decodr=FPN"], "did you mean 'decoder'"),
        (["evaluate", "none", "--data", "earth"], "gspn dense train"),
        (["evaluate", "none", "--data", "earth", "--set", "target"], "of the form section.key=value"),
        (["predict", "x.png", "--model", "none", "--output", "out", "--overlap", "0.9"], "overlap"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
