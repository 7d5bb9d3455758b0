"""``gspn bench mixer`` and ``gspn bench models``: what they write, what they refuse."""

from __future__ import annotations

import csv

import pytest
import torch
from typer.testing import CliRunner

from gspn.bench import mixer, models
from gspn.cli import app

QUICK = ["--device", "cpu", "--threads", "1", "--repeats", "1", "--min-time", "0"]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    before = torch.get_num_threads()
    yield lambda *options: CliRunner().invoke(app, ["bench", *(str(option) for option in options)])
    torch.set_num_threads(before)


def test_mixer_writes_a_table_and_a_image(run, tmp_path):
    pytest.importorskip("matplotlib")
    table, image = tmp_path / "mixer.csv", tmp_path / "mixer.png"
    result = run("mixer", *QUICK, "--dim", "16", "--side", "6", "--side", "4", "--output", table, "--plot", image)
    assert result.exit_code == 0, result.output
    assert "attention backend" in result.output
    assert "time ~ pixels^p" in result.output
    rows = list(csv.DictReader(table.open()))
    assert [(row["height"], row["name"]) for row in rows] == [(s, n) for s in "46" for n in mixer.CANDIDATES]
    assert {row["threads"] for row in rows} == {"1"}
    assert image.read_bytes().startswith(b"\x89PNG")


def test_mixer_refuses_where_the_check_is_red(run, tmp_path, monkeypatch):
    red = mixer.Figure("y", 1.0, 0.1, 0.2)
    monkeypatch.setattr(mixer, "check_mixers", lambda problem: {"GSPN": [red]})
    result = run("mixer", *QUICK, "--output", tmp_path / "mixer.csv")
    assert result.exit_code == 1
    assert "nothing was timed" in result.output
    assert "GSPN: y is off by 1" in result.output
    assert not (tmp_path / "mixer.csv").exists()


def test_models_writes_a_table_and_a_image(run, tmp_path):
    pytest.importorskip("matplotlib")
    table, image = tmp_path / "models.csv", tmp_path / "models.png"
    result = run("models", *QUICK, "--model", "gspn_pico", "--model", "gspn_nano", "--baseline", "gspn_nano",
                 "--size", "32", "--output", table, "--plot", image)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(table.open()))
    assert [row["name"] for row in rows] == ["gspn_pico", "gspn_nano"]
    assert [row["baseline"] for row in rows] == ["gspn_nano"] * 2
    assert float(rows[1]["speedup_over_baseline"]) == 1
    assert all(float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in rows)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_models_refuses_where_the_check_is_red(run, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "why_not", lambda call, mode: "two calls differ")
    result = run("models", *QUICK, "--model", "gspn_pico", "--size", "16", "--output", tmp_path / "models.csv")
    assert result.exit_code == 1
    assert "nothing is reported" in result.output
    assert not (tmp_path / "models.csv").exists()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["mixer", "--mode", "both"], ["--mode", "'both'", "forward, train"]),
        (["mixer", "--side", "0"], ["--side", "0 is below 1"]),
        (["models", "--mode", "forward"], ["--mode", "'forward'", "inference, train"]),
        (["models", "--model", "gspn_huge", "--size", "16"], ["'gspn_huge'"]),
        (["models", "--model", "gspn_pico", "--baseline", "x"], ["baseline='x'"]),
        (["models", "--plot", "image.bmp"], ["--plot", "image.bmp", ".png"]),
    ],
)
def test_bad_options_are_named(run, options, shown):
    result = run(*options)
    assert result.exit_code == 2, result.output
    for expected in shown:
        assert expected in result.output
