"""``gspn class-conditional``: configurations, sizes, and what the commands hand on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers", reason="needs gspn[diffusers]")

from typer.testing import CliRunner

from gspn._errors import UsageError
from gspn.cli import app
from gspn.cli.options import parse_size
from gspn.tasks import class_conditional
from gspn.tasks.core.config import read_yaml


def run(*arguments):
    return CliRunner().invoke(app, ["class-conditional", *arguments], env={"COLUMNS": "200"})


def test_flags_reach_the_configuration():
    options = ["--model", "dit", "--model-size", "B/4", "--size", "48", "--latents", "l", "--lr", "0.5"]
    values = read_yaml(run("train", *options, "--dry-run").output, "it")
    assert (values["model"]["name"], values["model"]["size"]) == ("dit", "B/4")
    assert (values["data"]["size"], values["data"]["latents"], values["optim"]["lr"]) == (48, "l", 0.5)


def test_a_size_is_width_by_height(monkeypatch):
    received = {}

    def sample(model, **options):
        received.update(options, model=model)
        return SimpleNamespace(is_main=False)

    monkeypatch.setattr(class_conditional, "sample", sample, raising=False)
    result = run("sample", "m", "--size", "48x64", "--class", "3", "--class", "cat", "--scheduler", "ddim", "--no-grid")
    assert result.exit_code == 0, result.output
    assert (received["width"], received["height"]) == (48, 64)
    assert (received["classes"], received["grid"], received["model"]) == (["3", "cat"], False, "m")
    assert "ddim" in received.values()
    assert run("sample", "m", "--size", "48").exit_code == 0
    assert (received["width"], received["height"]) == (48, 48)


@pytest.mark.parametrize("text", ["", "x", "48x", "x48", "0", "48x0", "4.5", "-3", "1x2x3", "²"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_the_results_go_to_a_directory(monkeypatch, tmp_path):
    written = []
    numbers = dict.fromkeys(
        [
            "fid",
            "sfid",
            "kid",
            "kid_std",
            "inception_score",
            "inception_score_std",
            "precision",
            "recall",
            "consistency",
        ],
        0.5,
    )
    texts = dict.fromkeys(("samples", "reference", "features", "classifier"), "one")
    counts = dict.fromkeys(("sample_count", "reference_count", "width", "height"), 7)
    result = SimpleNamespace(
        **numbers, **texts, **counts, per_class={"cat": 0.25}, broken=["a.png"], write_json=written.append
    )
    monkeypatch.setattr(class_conditional, "evaluate", lambda *args, **options: result, raising=False)
    found = run("evaluate", "samples", "--reference", "digits:train", "--output", str(tmp_path))
    assert found.exit_code == 0, found.output
    assert written == [tmp_path / "evaluation.json"]
    assert "least: cat 25.0%" in found.output and "a.png" in found.output

    # Of the processes that torchrun started, the first prints and writes.
    monkeypatch.setenv("RANK", "1")
    found = run("evaluate", "samples", "--reference", "digits:train", "--output", str(tmp_path))
    assert (found.exit_code, found.output, len(written)) == (0, "", 1)
