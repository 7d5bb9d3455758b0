"""``gspn bench propagate``, ``block`` and ``scaling``: tables and files on maps of a few pixels."""

from __future__ import annotations

import csv

import pytest
from typer.testing import CliRunner

from gspn.bench.propagate import PROPAGATE, PropagateProblem, check_propagate, operations
from gspn.cli import app

SMALL = ["--channels", "16", "--side", "6", "--side", "9", "--min-time", "0", "--repeats", "2"]


@pytest.mark.parametrize("command", ["propagate", "block", "scaling"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_writes_a_row_for_each_candidate_and_size(command, mode, tmp_path) -> None:
    output, plot = tmp_path / "out.csv", tmp_path / "out.png"
    run = CliRunner().invoke(
        app, ["bench", command, *SMALL, "--mode", mode, "--output", str(output), "--plot", str(plot)]
    )
    assert run.exit_code == 0, run.output
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == {"propagate": 8, "block": 8, "scaling": 2}[command]
    assert all(float(row["p50_ms"]) > 0 for row in rows)
    assert {row["attention"] for row in rows} >= ({"none"} if command == "scaling" else {"none", "flash"})
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "pixels^p" in run.output


def test_refuses_to_time_what_is_wrong(monkeypatch) -> None:
    from gspn.ops.cpu import propagate as cpu

    right = cpu.propagate
    monkeypatch.setattr(cpu, "propagate", lambda *a: right(*a) * 1.001)
    assert not all(figure.ok for figure in check_propagate(PropagateProblem(channels=16)))
    run = CliRunner().invoke(app, ["bench", "propagate", *SMALL])
    assert run.exit_code == 1
    assert "nothing was timed" in run.output


def test_the_count_of_operations() -> None:
    # 12 taps, 4 lam and 4 u maps and a skip of 8 states: 168 multiply-adds; and the rest as the module says.
    assert operations(640, 8, 640) == 2 * 168 + 4 * (42 + 6 + 8) + 1
    assert operations(640, 8, 1) < operations(640, 8, 320) < operations(640, 8, 640)
    assert PropagateProblem(channels=64).macs(PROPAGATE, 2) == 4 * 64 * (168 + 16)
