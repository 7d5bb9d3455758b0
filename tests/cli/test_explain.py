"""``gspn explain``: what it writes, what it refuses, and what is imported only when it runs."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from gspn.cli import app
from support import run_python


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.jpg"
    pixels = (torch.rand(40, 70, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *options: CliRunner().invoke(app, ["explain", *(str(option) for option in options)])


def test_writes_an_image_and_a_table(run, photograph, tmp_path):
    pytest.importorskip("matplotlib")
    output, report = tmp_path / "out" / "map.png", tmp_path / "out" / "scans.csv"
    result = run(photograph, "--model", "gspn_pico.untrained", "--point", "69,39", "--size", "48",
                 "--output", output, "--report", report)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "no pretrained weights" in result.output
    assert "random, seed 0" in result.output
    assert "stages.2.blocks.3" in result.output
    assert str(output) in result.output.replace("\n", "")
    assert output.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(report.open()))
    assert len(rows) == 6 * 4
    assert {row["ok"] for row in rows} == {"True"}


def test_the_table_alone_needs_no_output(run, photograph):
    result = run(photograph, "--size", "32", "--stage", "0")
    assert result.exit_code == 0, result.output
    assert "tap sum" in result.output
    assert "wrote" not in result.output


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--point", "70,0"], ["--point", "'70,0'", "70 x 40"]),
        (["--point", "middle"], ["--point", "'middle'", "X,Y"]),
        (["--model", "gspn_tinny"], ["gspn_tinny", "gspn_tiny"]),
        (["--stage", "7", "--size", "32"], ["no stage 7"]),
        (["--output", "map.bmp"], ["--output", "map.bmp", ".png"]),
        (["--model", "gspn_tiny.in99"], ["gspn_tiny.in99"]),
    ],
)
def test_bad_options_are_named(run, photograph, options, shown):
    result = run(photograph, *options)
    assert result.exit_code == 2, result.output
    for expected in shown:
        assert expected in result.output


def test_files_that_are_not_images(run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    for path, code in ((broken, 2), (tmp_path / "missing.png", 1), (tmp_path, 1)):
        result = run(path)
        assert result.exit_code == code, result.output
        assert path.name in result.output.replace("\n", "")


def test_a_missing_package_names_its_extra(run, photograph, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run(photograph)
    assert result.exit_code == 1
    assert "pip install 'gspn[train]'" in result.output


def test_the_help_imports_neither_models_nor_plots_nor_benchmarks():
    done = run_python("""
import sys
from gspn.cli import app
from typer.testing import CliRunner
for arguments in (["--help"], ["explain", "--help"], ["bench", "unet", "--help"], ["t2i", "train", "--help"]):
    assert CliRunner().invoke(app, arguments).exit_code == 0
heavy = ("timm", "matplotlib", "PIL", "torchvision", "diffusers", "accelerate", "yaml")
print([n for n in sys.modules if n in heavy or n.startswith(("gspn.bench.", "gspn.models.", "gspn.tasks.core.loop"))])
""")
    assert done.stdout.strip() == "[]"
