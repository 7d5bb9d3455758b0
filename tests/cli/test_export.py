"""``gspn export``: files of a saved model, and requests that are refused."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import save_for_hf
from typer.testing import CliRunner

import gspn.models  # noqa: F401
from gspn.cli import app


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """The directory of a run, with a small model as its best."""
    model = timm.create_model("gspn_pico", num_classes=4, dims=(8, 16), depths=(1, 1))
    folder = tmp_path_factory.mktemp("run")
    save_for_hf(model, str(folder / "best"), safe_serialization=True)
    return folder


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["export", *map(str, arguments)])


@pytest.mark.slow
def test_onnx(run_directory, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    result = run(run_directory, "-o", tmp_path / "model.onnx", "--size", "20x12", "--opset", 21)
    assert result.exit_code == 0, result.output
    for words in (
        "opset   21",
        "of which 8 are scans",
        "x [batch, 3, height, width]",
        "with 1 x 3 x 12 x 20, and at another",
    ):
        assert " ".join(words.split()) in " ".join(result.output.split())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.run(["output"], {"x": torch.randn(3, 3, 9, 14).numpy()})[0].shape == (3, 4)


def test_pt2_of_a_fixed_size(run_directory, tmp_path) -> None:
    result = run(run_directory / "best", "-o", tmp_path / "model.pt2", "--static", "--size", 16, "--batch", 2)
    assert result.exit_code == 0, result.output
    assert "x [2, 3, 16, 16]" in result.output
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert loaded(torch.randn(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gspn_pico", "-o", "model.bin"), "the file's name has to end in .onnx or .pt2"),
        (("gspn_pico", "-o", "model.pt2", "--format", "onnx"), "the file's name has to end in .onnx"),
        (("gspn_pico", "-o", "model.pt2", "--opset", "20"), "--opset 20: a .pt2 file has no opset"),
        (("gspn_pic", "-o", "model.pt2"), "unknown model 'gspn_pic'; did you mean 'gspn_pico'?"),
        (("gspn_pico", "-o", "model.onnx", "--opset", "9"), "opset=9: use 18 to 23"),
        (("gspn_pico", "-o", "model.onnx", "--size", "0x4"), "--size '0x4' is not a size"),
    ],
)
def test_wrong_requests_write_nothing(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
