"""``gspn bench gpu-counts``: the names of its cases, what it refuses, and its table."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from gspn.bench import gpu_counts
from gspn.bench.gpu_cases import all_cases, default_cases
from gspn.cli import app


def run(*options: object):
    return CliRunner().invoke(app, ["bench", "gpu-counts", *map(str, options)])


def test_lists_the_names_of_cases() -> None:
    assert run("--list").stdout.split() == [case.name for case in default_cases()]
    assert run("--list", "--all").stdout.split() == [case.name for case in all_cases()]
    some = run("--list", "--case", "propagate/*/74/fp16/nchw/shared/s2/*").stdout.split()
    assert some == [f"propagate/b32c1152/74/fp16/nchw/shared/s2/{mode}" for mode in ("forward", "backward")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "propagate/nothing"], "'propagate/nothing' matches no case; --all --list prints their names"),
        (["--arch", "75"], "75 is not one of 80, 86, 90, 100, 120"),
    ],
)
def test_refuses(options, message) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_the_interpreter_compiles_nothing(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("--case", "line_scan/b16c8/*/down/forward", "--arch", "90")
    assert result.exit_code == 2
    assert "TRITON_INTERPRET is set" in result.output


def test_a_file_of_another_version_is_not_written_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_counts, "tools", lambda: tmp_path)
    path = tmp_path / "counts.csv"
    path.write_text("case,launch\nmine,1\n")
    result = run("--output", path)
    assert result.exit_code == 2
    assert "has not the columns that this version writes" in " ".join(result.output.split())
    assert path.read_text() == "case,launch\nmine,1\n"


def test_prints_a_row_for_each_call(monkeypatch) -> None:
    name = "line_scan/b16c8/1024/fp32/nchw/per-channel/down/forward"
    row = {"case": name, "arch": 90, "card": "H100 SXM", "registers": 64, "predicted_ms": 1.25, "note": ""}
    rows = [row | {"launch": 0}, row | {"launch": "all", "note": "something is amiss"}]
    monkeypatch.setattr(gpu_counts, "count_cases", lambda *_, **__: rows)
    result = run("--case", name, "--arch", "90")
    assert result.exit_code == 0, result.output
    assert "sm_90, H100 SXM" in result.output
    assert [line.split()[0] for line in result.output.splitlines() if name in line] == [name, f"{name}:"]
    assert "something is amiss" in result.output
