"""``gspn bench line-scan``: the table and files that it writes, and the requests that it refuses."""

from __future__ import annotations

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import gspn
from gspn.bench import environment, timing
from gspn.cli import app
from gspn.ops import reference
from gspn.ops.implementations import IMPLEMENTATIONS

COLUMNS = (
    "op,impl,mode,direction,dtype,batch,channels,height,width,groups,segment,memory_format,p20_ms,p50_ms,p80_ms,samples,"
    "bytes,gbs,copy,copy_gbs,fraction_of_copy,speedup_over_loop,peak_memory_mb,pages,"
    "device,threads,isa,gspn,torch,triton,python,os,commit,date"
)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 16)  # read before each call

    def invoke(*options: str):
        tiny = ["--device", "cpu", "--batch", "1", "--channels", "2", "--size", "6x9"]
        quick = ["--repeats", "2", "--min-time", "0"]
        return CliRunner().invoke(app, ["bench", "line-scan", *tiny, *quick, *options])

    return invoke


@pytest.fixture
def wrong_implementation(monkeypatch):
    """An implementation that is off by a thousandth in the gradient of x alone."""

    def backward(*arguments):
        dx, dtaps, dlam = reference.line_scan_backward(*arguments)
        return dx * 1.001, dtaps, dlam

    module = SimpleNamespace(line_scan=reference.line_scan, line_scan_backward=backward)
    backend = SimpleNamespace(__name__="wrong", DEVICES=(), why_not=lambda *_: None)
    monkeypatch.setitem(sys.modules, "wrong", backend)
    monkeypatch.setitem(sys.modules, "wrong.line_scan", module)
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", backend)


def test_writes_a_row_for_each_result(run, tmp_path):
    path = tmp_path / "results" / "table.csv"
    result = run("--direction", "left", "--impl", "reference", "--segment", "4", "--groups", "1", "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "of copy" in result.output
    assert str(path) in result.output
    with path.open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert ",".join(reader.fieldnames or []) == COLUMNS
    assert [row["mode"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row["op"] == "line_scan"
        assert row["direction"] == "left"
        assert row["impl"] == "reference"
        assert (row["height"], row["width"], row["groups"], row["segment"]) == ("9", "6", "1", "4")
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["speedup_over_loop"]) == 1
        assert row["torch"] == torch.__version__
        assert row["gspn"] == gspn.__version__
    assert [row["bytes"] for row in rows] == [str((3 * 2 + 3) * 54 * 4), str((6 * 2 + 6) * 54 * 4)]


def test_all_directions_and_implementations_by_default(run, tmp_path):
    path = tmp_path / "table.csv"
    result = run("--dtype", "bfloat16", "--memory-format", "channels_last", "--mode", "forward", "--output", str(path))
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(path.open()))
    runs = gspn.available_impls(torch.empty(0, dtype=torch.bfloat16), op="line_scan")
    able = {name for name, reason in runs.items() if reason is None}
    assert {(row["direction"], row["impl"]) for row in rows} == {(d, name) for d in gspn.DIRECTIONS for name in able}
    assert {row["memory_format"] for row in rows} == {"channels_last"}


def test_plots(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    result = run("--direction", "up", "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_threads_are_set_and_reported(run, tmp_path):
    before = torch.get_num_threads()
    path = tmp_path / "table.csv"
    try:
        result = run(
            "--threads",
            "1",
            "--direction",
            "up",
            "--no-baselines",
            "--impl",
            "reference",
            "--fresh-pages",
            "--output",
            str(path),
        )
        assert result.exit_code == 0, result.output
        rows = list(csv.DictReader(path.open()))
        assert {(row["threads"], row["pages"]) for row in rows} == {("1", "system")}
    finally:
        torch.set_num_threads(before)


def test_a_failed_check_is_shown_and_nothing_is_written(run, tmp_path, wrong_implementation):
    path = tmp_path / "table.csv"
    result = run("--direction", "down", "--output", str(path))
    assert result.exit_code == 1
    assert "nothing was timed" in result.output
    assert "wrong" in result.output
    assert "dx" in result.output
    assert "of copy" not in result.output
    assert not path.exists()


def test_a_wrong_gradient_does_not_stop_a_forward(run, tmp_path, wrong_implementation):
    result = run("--direction", "down", "--mode", "forward")
    assert result.exit_code == 0, result.output
    assert "wrong" in result.output


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--direction", "sideways"], ["--direction", "'sideways'", "down, up, right, left"]),
        (["--mode", "both"], ["--mode", "'both'", "forward, backward"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "float32, bfloat16, float16, float64"]),
        (["--memory-format", "nhwc"], ["'nhwc'", "contiguous, channels_last"]),
        (["--impl", "cuda"], ["--impl", "'cuda'", "triton, cpu, reference"]),
        (["--groups", "3"], ["--groups", "3 does not divide --channels 2"]),
        (["--device", "abacus"], ["--device", "'abacus'", "cuda:N"]),
        (["--device", "meta"], ["--device", "'meta'", "cpu and cuda"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'", "CUDA devices"]),
        (["--segment", "0"], ["'--segment'", "1"]),
        (["--size", "6x"], ["'6x'", "WIDTHxHEIGHT"]),
        (["--min-time", "-1"], ["'--min-time'", "0"]),
        (["--plot", "image.bmp"], ["--plot", "image.bmp", ".png"]),
    ],
)
def test_bad_options_are_named(run, options, shown):
    result = run(*options)
    assert result.exit_code == 2, result.output
    for expected in shown:
        assert expected in result.output


def test_an_implementation_that_cannot_run_says_why(run, monkeypatch):
    reason = "it needs another machine."
    monkeypatch.setattr(IMPLEMENTATIONS["triton"], "why_not", lambda *_: reason)
    result = run("--impl", "triton")
    assert result.exit_code == 2
    assert reason in result.output


def test_a_problem_larger_than_the_memory_is_refused(run, monkeypatch):
    monkeypatch.setattr(environment, "free_memory", lambda device: 1000)
    result = run()
    assert result.exit_code == 1
    assert "GiB" in result.output
    assert "--batch" in result.output
