"""``gspn t2i`` on the command line: configurations, presets, and what a wrong request says."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs gspn[diffusers]")
pytest.importorskip("transformers", reason="needs gspn[text]")

from typer.testing import CliRunner

from gspn.cli import app
from gspn.tasks.core.config import read_yaml


def run(*arguments):
    return CliRunner().invoke(app, ["t2i", *arguments])


def test_commands_and_presets():
    assert all(name in run("--help").output for name in ("sample", "distill", "train", "autoencoder", "evaluate"))
    listed = run("presets").output
    for command in ("autoencoder", "train", "distill"):
        assert f"gspn t2i {command}" in listed
        assert read_yaml(run("preset", command, "emoji64").output, "it")["data"]["size"] == 64
    assert run("preset", "sample", "emoji64").exit_code == 2
    assert run("preset", "train", "emoji").exit_code == 2


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("distill", ["--teacher", "x/y", "--block-epochs", "2"], {"teacher": "x/y", "distillation.block_epochs": 2}),
        ("train", ["--vae", "v", "--lr", "0.5"], {"model.vae": "v", "optim.lr": 0.5}),
        ("train", ["--set", "data.batch_size=3", "--batch-size", "5"], {"data.batch_size": 5}),
        ("autoencoder", ["--data", "folder", "--root", "r", "--seed", "4"], {"data.name": "folder", "run.seed": 4}),
    ],
)
def test_flags_reach_the_configuration(command, options, expected):
    found = run(command, "--config", "emoji64", "--dry-run", *options)
    assert found.exit_code == 0, found.output
    values = read_yaml(found.output, "it")
    for key, value in expected.items():
        section, _, rest = key.partition(".")
        assert (values[section][rest] if rest else values[section]) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--set", "model.initialise=fit"], "initialize"),
        (["distill", "--teacher", "nowhere"], "model_index.json"),
        (["train", "--config", "emoji65"], "emoji64"),
        (["train", "--config", "emoji64"], "gspn t2i autoencoder"),
        (["sample", "cat", "--model", "nowhere"], "model_index.json"),
        (["evaluate", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message, tmp_path):
    if arguments[0] in ("distill", "train"):
        arguments = [*arguments, "--output", str(tmp_path / "run")]
    found = run(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr and len(found.stderr.strip().splitlines()) == 1
