"""``gspn models``."""

from __future__ import annotations

import sys

import timm
from typer.testing import CliRunner

import gspn.models  # noqa: F401
from gspn.cli import app


def test_every_model_is_listed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0, result.output
    names = timm.list_models("gspn*")
    assert names
    assert all(name in result.output for name in names)
    assert "31.5" in result.output


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 1
    assert "pip install 'gspn[train]'" in result.output
