"""``gspn``, ``gspn --version``, ``python -m gspn`` and ``gspn info``."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import gspn
from gspn.cli import app
from gspn.ops.implementations import IMPLEMENTATIONS, OPS


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line of the table is wrapped
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_version(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"gspn {gspn.__version__}\n"


def test_help_lists_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert "info" in result.output
    assert "bench" in result.output
    assert "line-scan" in run("bench", "--help").output


def test_info_names_versions_hardware_and_implementations(run):
    result = run("info")
    assert result.exit_code == 0, result.output
    for expected in (gspn.__version__, torch.__version__, platform.python_version(), "triton", "cuda"):
        assert expected in result.output
    for name in IMPLEMENTATIONS:
        assert name in result.output
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        assert dtype in result.output


def test_info_says_why_an_implementation_cannot_run(run, monkeypatch):
    reason = "no compiler was found on this machine."
    monkeypatch.setattr(IMPLEMENTATIONS["cpu"], "why_not", lambda device, dtype, op: reason)
    output = run("info").output
    assert output.count(reason) == len(OPS) * (1 + torch.cuda.device_count())


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "gspn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gspn {gspn.__version__}\n"


def test_importing_gspn_imports_nothing_of_the_command():
    program = """
import sys, gspn
print([n for n in sys.modules if n.split(".")[0] in ("typer", "rich", "matplotlib") or n.startswith(
    ("gspn.cli", "gspn.bench"))])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
