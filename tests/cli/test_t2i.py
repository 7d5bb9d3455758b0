"""``gspn t2i`` and ``gspn autoencode``: configurations, presets, and the message of a wrong request."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs gspn[diffusers]")
pytest.importorskip("transformers", reason="needs gspn[text]")

from typer.testing import CliRunner

from gspn.cli import app
from gspn.tasks.core.config import read_yaml


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_commands_and_presets():
    assert all(name in run("t2i", "--help").output for name in ("sample", "distill", "train", "evaluate"))
    listed = run("t2i", "presets").output
    for command in ("train", "distill"):
        assert command in listed
        assert read_yaml(run("t2i", "preset", command, "emoji64").output, "it")["data"]["size"] == 64
    assert "emoji64" in run("autoencode", "presets").output
    assert read_yaml(run("autoencode", "preset", "emoji64").output, "it")["model"]["latent_channels"] == 4
    assert run("t2i", "preset", "sample", "emoji64").exit_code == 2
    assert run("t2i", "preset", "train", "emoji").exit_code == 2


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        (
            "t2i distill",
            ["--teacher", "x/y", "--block-epochs", "2"],
            {"teacher": "x/y", "distillation.block_epochs": 2},
        ),
        ("t2i train", ["--vae", "v", "--lr", "0.5"], {"model.vae": "v", "optim.lr": 0.5}),
        ("t2i train", ["--set", "data.batch_size=3", "--batch-size", "5"], {"data.batch_size": 5}),
        ("autoencode train", ["--data", "folder", "--root", "r", "--seed", "4"], {"data.root": "r", "run.seed": 4}),
    ],
)
def test_flags_reach_the_configuration(command, options, expected):
    result = run(*command.split(), "--config", "emoji64", "--dry-run", *options)
    assert result.exit_code == 0, result.output
    values = read_yaml(result.output, "it")
    for key, value in expected.items():
        section, _, rest = key.partition(".")
        assert (values[section][rest] if rest else values[section]) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--set", "model.initialise=fit"], "initialize"),
        (["distill", "--teacher", "nowhere"], "model_index.json"),
        (["train", "--config", "emoji65"], "emoji64"),
        (["train", "--config", "emoji64"], "model.vae"),
        (["sample", "cat", "--model", "nowhere", "--size", "64by64"], "--size '64by64'"),
        (["sample", "cat", "--model", "nowhere"], "model_index.json"),
        (["evaluate", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message, tmp_path):
    if arguments[0] in ("distill", "train"):
        arguments = [*arguments, "--output", str(tmp_path / "run")]
    result = run("t2i", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
