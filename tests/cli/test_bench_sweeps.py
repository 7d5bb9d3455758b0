"""``gspn bench propagate``, ``scaling``, ``mixer``, ``unet`` and ``models``: what they write, what they refuse."""

from __future__ import annotations

import csv

import pytest
import torch
from typer.testing import CliRunner

from gspn.bench import mixer, models, propagate, timing
from gspn.bench.accuracy_check import Accuracy
from gspn.bench.report import COLUMNS
from gspn.cli import app
from support import run_python

QUICK = ["--device", "cpu", "--threads", "1", "--repeats", "1", "--min-time", "0"]
SMALL = ["--channels", "16", "--size", "6", "--size", "9"]
OPERATORS = propagate.PropagateSweep.candidates


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 16)  # read before each call
    before = torch.get_num_threads()
    yield lambda *options: CliRunner().invoke(app, ["bench", *(str(option) for option in options)])
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("command", "mode", "candidates", "attention"),
    [
        (["propagate", "--impl", "cpu"], "forward", OPERATORS, {"none", "flash"}),
        (
            ["propagate", "--shared", "--proxy-dim", "4"],
            "train",
            propagate.PropagateSweep.candidates,
            {"none", "flash"},
        ),
        (["scaling", "--segment", "4"], "forward", (propagate.PROPAGATE,), {"none"}),
        (["scaling", "--attention"], "train", (propagate.PROPAGATE, propagate.SELF_ATTENTION), {"none", "flash"}),
        (["mixer"], "train", mixer.MixerSweep.candidates, {"none", "flash"}),
        (["mixer", "--bare"], "forward", mixer.MixerSweep.candidates, {"none", "flash"}),
    ],
)
def test_writes_a_row_for_each_size_and_candidate(run, command, mode, candidates, attention, tmp_path):
    pytest.importorskip("matplotlib")
    table, image = tmp_path / "out.csv", tmp_path / "out.png"
    result = run(*command, *QUICK, *SMALL, "--mode", mode, "--output", table, "--plot", image)
    assert result.exit_code == 0, result.output
    with table.open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ())[: len(COLUMNS)] == COLUMNS
    assert [(row["height"], row["name"]) for row in rows] == [(size, name) for size in "69" for name in candidates]
    assert all(float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in rows)
    assert {row["attention"] for row in rows} == attention
    assert {(row["threads"], row["mode"]) for row in rows} == {("1", mode)}
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "pixels^p" in result.output
    assert ("attention backend" in result.output) == ("flash" in attention)


def test_unet_writes_a_row_for_each_candidate(run, tmp_path):
    pytest.importorskip("diffusers.models", reason="needs gspn[diffusers]")
    table, image = tmp_path / "unet.csv", tmp_path / "unet.png"
    result = run("unet", *QUICK, "--width", 20, "--size", 64, "--backend", "math", "--output", table, "--plot", image)
    assert result.exit_code == 0, result.output
    assert "no self-attention" in result.output and "over the bound" in result.output and image.is_file()
    assert table.read_text().count("\n") == 6 and "math" in table.read_text()
    result = run("unet", *QUICK, "--width", 20, "--size", 128, "--size", 100)
    assert result.exit_code == 2 and "multiple of 64" in result.output


def test_unet_by_layer_continues_its_table(run, tmp_path):
    pytest.importorskip("diffusers.models", reason="needs gspn[diffusers]")
    table, image = tmp_path / "layers.csv", tmp_path / "layers.png"
    options = ["unet", "--by-layer", *QUICK, "--width", 20, "--size", "64..128", "--processor-time", "--slowest", 0,
               "--steps", 7, "--output", table, "--plot", image]  # fmt: skip
    result = run(*options)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(table.open()))
    assert {row["size"] for row in rows} >= {"64", "128"} and len(rows) > 200
    assert "7 steps" in result.output and "token mixer" in result.output and "~" in result.output
    assert "tokens^" in result.output and image.read_bytes().startswith(b"\x89PNG")
    written = table.read_text()
    again = run(*options)  # only what is fitted is computed again, and comes out the same
    assert [line for line in again.output.splitlines() if "GSPN" in line] == [
        line for line in result.output.splitlines() if "GSPN" in line
    ]
    assert [line.rpartition(",")[0] for line in table.read_text().splitlines()] == [
        line.rpartition(",")[0] for line in written.splitlines()
    ]


def test_models_writes_a_row_for_each_model(run, tmp_path):
    pytest.importorskip("matplotlib")
    table, image = tmp_path / "models.csv", tmp_path / "models.png"
    result = run("models", *QUICK, "--model", "gspn_pico", "--model", "gspn_nano", "--baseline", "gspn_nano",
                 "--size", "32", "--output", table, "--plot", image)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(table.open()))
    assert [row["name"] for row in rows] == ["gspn_pico", "gspn_nano"]
    assert [row["baseline"] for row in rows] == ["gspn_nano"] * 2
    assert float(rows[1]["speedup_over_baseline"]) == 1
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_timed_where_the_check_fails(run, tmp_path, monkeypatch):
    wrong = {"GSPN": [Accuracy("y", 1.0, 0.1, 0.2)]}
    monkeypatch.setattr(mixer.MixerSweep, "check", lambda sweep: wrong)
    monkeypatch.setattr(models, "why_not", lambda call, mode: "two calls differ")
    for command, shown in (
        (["mixer"], "GSPN: y is off by 1, and 0.2 is accepted"),
        (["models", "--model", "gspn_pico", "--size", "16"], "gspn_pico at 16 x 16: two calls differ"),
    ):
        result = run(*command, *QUICK, "--output", tmp_path / "out.csv")
        assert result.exit_code == 1
        assert "nothing was timed" in result.output and shown in result.output
        assert not (tmp_path / "out.csv").exists()


def test_a_wrong_propagate_is_not_timed(run, monkeypatch):
    from gspn.ops.cpu import propagate as cpu

    right = cpu.propagate
    monkeypatch.setattr(cpu, "propagate", lambda *a: right(*a) * 1.001)
    (accuracies,) = propagate.PropagateSweep(channels=16).check().values()
    assert not all(one.ok for one in accuracies)
    result = run("propagate", *QUICK, *SMALL)
    assert result.exit_code == 1
    assert "nothing was timed" in result.output


def test_a_missing_package_names_its_extra():
    # In a process of its own, where nothing has imported the packages.
    done = run_python("""
import sys
sys.modules["timm"] = sys.modules["diffusers"] = None
from typer.testing import CliRunner
from gspn.cli import app
for command in ("mixer", "models", "unet"):
    result = CliRunner().invoke(app, ["bench", command])
    print(result.exit_code, " ".join(result.output.split()))
""")
    needs = (("timm", "train"), ("timm", "train"), ("diffusers", "diffusers"))
    for line, (package, extra) in zip(done.stdout.splitlines(), needs, strict=True):
        assert line.startswith("1 error: ") and f"needs {package}" in line and f"pip install 'gspn[{extra}]'" in line


def test_the_count_of_operations():
    # 12 taps, 4 lam and 4 u maps and a skip of 8 channels: 168 multiply-adds; and the rest as the module says.
    assert propagate.operations(640, 8, 640) == 2 * 168 + 4 * (42 + 6 + 8) + 1
    assert propagate.operations(640, 8, 1) < propagate.operations(640, 8, 320) < propagate.operations(640, 8, 640)
    assert propagate.PropagateSweep(channels=64).macs(propagate.PROPAGATE, 2) == 4 * 64 * (168 + 16)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["mixer", "--mode", "both"], ["--mode", "'both'", "forward, train"]),
        (["mixer", "--size", "0"], ["'--size'", "1"]),
        (["models", "--mode", "forward"], ["--mode", "'forward'", "inference, train"]),
        (["models", "--model", "gspn_huge", "--size", "16"], ["'gspn_huge'"]),
        (["models", "--model", "gspn_pico", "--baseline", "x"], ["baseline='x'"]),
        (["models", "--plot", "image.bmp"], ["--plot", "image.bmp", ".png"]),
        (["propagate", "--impl", "cuda"], ["--impl", "'cuda'", "auto, triton, cpu, reference"]),
        (["unet", "--width", "7"], ["does not divide the channels"]),
        (["unet", "--steps", "4"], ["--by-layer"]),
        (["unet", "--by-layer", "--processor-time", "--threads", "2"], ["--threads 1"]),
        (["unet", "--by-layer", "--size", "100"], ["multiple of 64"]),
        (["mixer", "--size", "32..16"], ["'32..16'", "grow"]),
        (["mixer", "--size", "2x"], ["'2x'", "512..16384"]),
    ],
)
def test_bad_options_are_named(run, options, shown):
    result = run(*options)
    assert result.exit_code == 2, result.output
    for expected in shown:
        assert expected in result.output
