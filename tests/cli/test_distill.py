"""``gspn distill``: configurations, presets, and the message of a wrong request."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from gspn.cli import app
from gspn.tasks.core.config import read_yaml


def run(*arguments):
    return CliRunner().invoke(app, ["distill", *arguments])


def test_flags_reach_the_configuration():
    flags = ["--teacher", "runs/vit", "--latent-dim", "16", "--block-epochs", "2", "--init-from", "runs/former"]
    result = run("train", "--config", "emoji_vit", "--dry-run", *flags)
    assert result.exit_code == 0, result.output
    values = read_yaml(result.output, "it")
    assert values["teacher"] == "runs/vit" and values["distillation"]["block_epochs"] == 2
    assert values["model"]["latent_dim"] == 16 and values["model"]["init_from"] == "runs/former"
    assert "emoji_vit" in run("presets").output
    assert read_yaml(run("preset", "emoji_vit").output, "it")["model"]["latent_dim"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.keep_attentions=[1]"], "keep_attention"),
        (["--set", "distillation.block_epochs=99"], "more than schedule.epochs"),
        (["--config", "emoji_vits"], "emoji_vit"),
        (["--teacher", "./nowhere", "--output", "unused"], "not a directory"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", *arguments)
    assert result.exit_code == 1 or result.exit_code == 2
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output
