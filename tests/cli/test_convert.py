"""``gspn convert``, on random weights in the layout of the authors' files."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from official_support import official_shapes, random_official_state

DIMS, DEPTHS = (96, 192, 384, 768), (2, 2, 7, 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Weights of GSPN-T for two classes, small enough to give finite logits."""
    shapes = official_shapes(DIMS, DEPTHS, state=8, classes=2)
    state = {name: (0.02 * value).float() for name, value in random_official_state(shapes).items()}
    path = tmp_path_factory.mktemp("official") / "tiny.pth"
    torch.save({"model": state, "epoch": 299, "max_accuracy": 83.04, "optimizer": {}}, path)
    return path


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["convert", *map(str, arguments)])


def test_convert_check_and_push(file, tmp_path, monkeypatch) -> None:
    uploads = {}

    class Hub:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, name: str, **_: object) -> types.SimpleNamespace:
            return types.SimpleNamespace(repo_id=name)

        def file_exists(self, **_: object) -> bool:
            return False

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: object) -> None:
            uploads[repo_id] = {one.name: one.read_bytes() for one in Path(folder_path).iterdir()}

    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    for name in ("a", "b"):
        folder = tmp_path / "imagenet" / "val" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (224, 224), "white").save(folder / "0.png")
    output = tmp_path / "gspn_tiny"
    result = run(file, "--model", "gspn_tiny", "--output", output, "--check", tmp_path / "imagenet", "--workers", 0,
                 "--device", "cpu", "--push", "somebody/gspn_tiny")  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("2 classes, from 'model'", "299", "83.04", "optimizer", "50.00 % of 2 images; published: 83.0 %"):
        assert words in result.output
    config = json.loads((output / "config.json").read_text())
    assert (config["architecture"], config["model_args"]["alignment"]) == ("gspn_tiny", "official")
    card = (output / "README.md").read_text()
    assert "license: other" in card
    assert "excludes commercial use" in card
    assert 'timm.create_model("hf-hub:somebody/gspn_tiny", pretrained=True)' in card
    loaded = timm.create_model(f"local-dir:{output}", pretrained=True)
    assert torch.equal(
        loaded.get_parameter("stem.conv1.weight"), torch.load(file, weights_only=True)["model"]["patch_embed.0.weight"]
    )
    sent = uploads["somebody/gspn_tiny"]
    assert sent["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert set(sent) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{file}", "-m", "gspn_small", "-o", "{new}"), "these are not the weights of gspn_small"),
        (("{file}", "-m", "gspn2_tiny", "-o", "{new}"), "official weights exist for gspn_tiny, gspn_small, gspn_base"),
        (("nothing.pth", "-m", "gspn_tiny", "-o", "{new}"), "OWNER/NAME/FILE"),
        (("{file}", "-m", "gspn_tiny", "-o", "{full}"), "has files; name a directory that is empty"),
    ],
)  # fmt: skip
def test_wrong_requests_write_nothing(arguments, message, file, tmp_path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    result = run(*(one.format(file=file, new=tmp_path / "new", full=full) for one in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert [one.name for one in sorted(tmp_path.rglob("*"))] == ["full", "mine.txt"]
