"""Every command that opens a folder says once, in one line, what it leaves out; and survives names of any bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("timm", reason="needs gspn[train]")
pytest.importorskip("accelerate", reason="needs gspn[train]")

from gspn.cli import app
from tasks.class_conditional.latent_runs import autoencoder
from tasks.class_conditional.test_evaluation import Small

ODD = os.fsdecode(b"\xff\n\x1b[31m.png")


@pytest.fixture
def images(tmp_path) -> Path:
    """Six images of two classes, two with a hostile name, one damaged; and other files."""
    for label in ("1", "2"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for name in ("a.png", "b.png", ODD):
            Image.effect_noise((28, 28), 99).save(tmp_path / "images" / label / name)
    (tmp_path / "images" / "2" / "a.png").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "images" / "1" / os.fsdecode(b"\xfe.txt")).write_text("")
    (tmp_path / "images" / ".hidden").write_text("")
    os.mkfifo(tmp_path / "images" / "2" / "pipe.png")
    (tmp_path / "images" / "2" / "up").symlink_to("..")
    return tmp_path / "images"


def commands(images: Path, out: Path) -> dict[str, list[str]]:
    root = ["--data", "folder", "--root", str(images)]
    autoencoder().save_pretrained(out / "vae")
    train = ["-s", "model.name=test_vit", "-s", "data.eval_split=train", "--epochs", "1", "--size", "32"]
    train += ["--batch-size", "2", "--workers", "0", "-s", "run.device=cpu", "-s", "run.trackers=[]"]
    return {
        "predict": ["classify", "predict", "-m", "gspn_pico.mnist5k", str(images)],
        "evaluate": ["classify", "evaluate", "gspn_pico.mnist5k", *root, "--split", "train", "--device", "cpu"],
        "train": ["classify", "train", *root, *train, "-o", str(out / "run")],
        "latents": [
            *("class-conditional", "latents", *root, "--vae", str(out / "vae"), "--size", "8", "--device", "cpu"),
            *("--workers", "0", "-o", str(out / "latents")),
        ],
        "compare": [
            *("class-conditional", "evaluate", str(images), "-r", "digits:val", "--device", "cpu"),
            *("--cache", str(out / "cache"), "--export", str(out / "a.npz")),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["predict", "evaluate", "train", "latents", "compare"])
def test_a_command_says_once_what_it_leaves_out(name, images, tmp_path, monkeypatch):
    monkeypatch.setattr("gspn.tasks.diffusion.evaluation.feature_model", lambda name: Small())
    result = CliRunner().invoke(app, commands(images, tmp_path)[name])
    assert result.exit_code == (1 if name == "predict" else 0), result.output  # predict's sign of a damaged image
    said = [line for line in result.output.splitlines() if ": left out: " in line]
    assert len(said) == 1, said
    for part in (
        "1 file that is not an image (1/\\xfe.txt)", "1 hidden file or folder (.hidden)",
        "1 pipe, socket or device (2/pipe.png)", "1 link to a folder that holds it (2/up)",
    ):  # fmt: skip
        assert part in said[0], said
    assert "\x1b[31m" not in result.output and "a.png" in result.output
