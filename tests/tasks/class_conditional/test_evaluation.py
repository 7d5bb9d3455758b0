"""Evaluating sets of images, with a small model in place of the feature models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.tasks.class_conditional import evaluate
from gspn.tasks.class_conditional.evaluation import Classifier
from gspn.tasks.diffusion import evaluation
from gspn.tasks.diffusion.features import FeatureModel, Features


class Small(FeatureModel):
    label = "random projections"
    calls = 0

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(192, 12, generator=generator) / 14)

    def forward(self, images):
        Small.calls += len(images)
        assert images.min() >= 0 and images.max() <= 1
        x = F.interpolate(images, (8, 8), mode="bilinear").flatten(1)
        return Features(x @ self.weight, x[:, :10], x @ self.weight[:, :5])


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(evaluation, "feature_model", lambda name: Small())
    Small.calls = 0


@pytest.fixture
def sampled(tmp_path):
    """A folder of images that say which class they were sampled for."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "sampled"
    folder.mkdir()
    for i in range(12):
        info = PngInfo()
        info.add_text("gspn", json.dumps({"label": i % 3}))
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:05d}.png", pnginfo=info)
    Image.new("RGB", (99, 99)).save(folder / "grid.png")
    return folder


def test_a_set_and_itself(sampled, tmp_path):
    found = evaluate(sampled, sampled, device="cpu", cache=tmp_path / "cache", neighbours=tmp_path / "near.png")
    assert found.fid == pytest.approx(0, abs=1e-6) and found.sfid == pytest.approx(0, abs=1e-6)
    assert (found.precision, found.recall) == (1, 1)
    assert (found.sample_count, found.height, found.features) == (12, 8, "random projections")
    assert found.consistency is None
    with Image.open(tmp_path / "near.png") as image:
        assert image.width > 13 * 64 and image.height > 10 * 64
    found.write_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["precision"] == 1


def test_a_reference_is_kept_and_a_damaged_one_made_again(sampled, tmp_path):
    cache = tmp_path / "cache"
    first = evaluate(sampled, "digits:val", device="cpu", cache=cache)
    assert first.fid > 0 and first.reference_count > 300
    computed = Small.calls
    assert evaluate(sampled, "digits:val", device="cpu", cache=cache) == first
    assert Small.calls - computed == 12
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert evaluate(sampled, "digits:val", device="cpu", cache=cache) == first
    # Other images are another file.
    evaluate(sampled, "digits:val", device="cpu", cache=cache, limit=8)
    assert len(list(cache.iterdir())) == 2


def test_consistency(sampled, tmp_path):
    first = Classifier("some", lambda images: [0] * len(images), ["x", "y", "z"])
    found = evaluate(sampled, sampled, classifier=first, device="cpu", cache=None)
    assert found.consistency == pytest.approx(1 / 3) and found.classifier == "some"
    assert found.per_class == {"x": 1.0, "y": 0.0, "z": 0.0}
    right = Classifier("right", lambda images: [i % 3 for i in range(len(images))])
    found = evaluate(sampled, sampled, classifier=right, device="cpu", cache=None)
    assert found.consistency == 1 and found.per_class == {"0": 1.0, "1": 1.0, "2": 1.0}
    for file in sampled.glob("0*.png"):
        Image.open(file).save(file)  # which forgets the class
    with pytest.raises(UsageError, match="which class each image was sampled for"):
        evaluate(sampled, sampled, classifier=first, device="cpu", cache=None)


def test_another_classifier_is_refused_before_the_long_work(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((8, 4, 4, 3), np.uint8), arr_1=np.arange(8))
    monkeypatch.setattr("gspn.tasks.class_conditional.evaluation.compare_images", None)
    two = Classifier("two", lambda images: [0] * len(images), ["x", "y"])
    with pytest.raises(UsageError, match=r"has images of class 7, and the classifier two has 2 classes"):
        evaluate(tmp_path / "a.npz", tmp_path / "a.npz", classifier=two, device="cpu", cache=None)


def test_the_command(sampled, tmp_path):
    arguments = ["class-conditional", "evaluate", str(sampled), "-r", "digits:val", "--device", "cpu"]
    options = ["--classifier", "gspn_pico.mnist5k"]
    files = {name: tmp_path / name for name in ("evaluation.json", "near.png", "samples.npz")}
    options += ["--output", tmp_path, "--neighbours", files["near.png"], "--export", files["samples.npz"]]
    result = CliRunner().invoke(app, [*arguments, *map(str, options), "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0, result.output
    assert "FID" in result.output and "random projections" in result.output and "by gspn_pico.mnist5k" in result.output
    assert set(json.loads(files["evaluation.json"].read_text())["per_class"]) == {"0", "1", "2"}
    assert all(path.is_file() for path in files.values())
    result = CliRunner().invoke(app, ["class-conditional", "evaluate", "nowhere", "-r", "digits:val"])
    assert result.exit_code == 2 and "nowhere" in result.output


def test_folders_are_matched_by_the_names_of_classes(tmp_path):
    """Folders 1, 2, 10: neither their order by number nor by letter is the classifier's."""
    rng = np.random.default_rng(0)
    names = ["2", "10", "1", "5"]
    for number, name in enumerate(names[:3]):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            pixels[0, 0] = number
            Image.fromarray(pixels).save(tmp_path / "folders" / name / f"{i}.png")
    classifier = Classifier("some", lambda images: [image.getpixel((0, 0))[0] for image in images], names)
    found = evaluate(tmp_path / "folders", tmp_path / "folders", classifier=classifier, device="cpu", cache=None)
    assert found.consistency == 1 and found.per_class == {"1": 1.0, "2": 1.0, "10": 1.0}
    for unknown, says in ((names[1:], "names 10, 1, 5, ..."), (None, "does not name its classes")):
        other = Classifier("other", classifier.classify, unknown)
        with pytest.raises(UsageError, match=rf"has images of .*, and the classifier other {says}"):
            evaluate(tmp_path / "folders", tmp_path / "folders", classifier=other, device="cpu", cache=None)
