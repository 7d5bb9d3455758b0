"""The protocol of backends: a new one is one entry and one folder."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gspn
from gspn.ops import backend, implementations
from gspn.ops.implementations import IMPLEMENTATIONS, OPS

PROTOCOLS = {"line_scan": backend.LineScan, "propagate": backend.Propagate}


@pytest.fixture
def metal(monkeypatch, tmp_path):
    """A backend for CPU tensors in front of all others, which refuses what ``metal.reason`` says."""
    folder = tmp_path / "metal"
    folder.mkdir()
    init = "reason = None\nDEVICES = ('cpu',)\ndef why_not(device, dtype, op):\n    return reason\n"
    (folder / "__init__.py").write_text(init)
    for op in OPS:
        (folder / f"{op}.py").write_text(f"from gspn.ops.reference import {op}, {op}_backward\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("metal")
    entries = {"metal": module, **IMPLEMENTATIONS}
    monkeypatch.setattr(implementations, "_auto_choice", {})
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", entries)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "metal"]:
        del sys.modules[name]


def test_a_backend_is_chosen_named_and_listed(metal) -> None:
    x, taps = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3, 3)
    assert list(gspn.available_impls(x)) == ["metal", "triton", "cpu", "reference"]
    assert gspn.available_impls(x)["metal"] is None
    for op in OPS:
        assert implementations.resolve("auto", x, op).__name__ == f"metal.{op}"
    expected = gspn.line_scan(x, taps, direction="down", impl="reference")
    assert torch.equal(gspn.line_scan(x, taps, direction="down", impl="metal"), expected)
    with pytest.raises(ValueError, match="auto, metal, triton, cpu, reference"):
        gspn.line_scan(x, taps, direction="down", impl="tin")


def test_a_backend_that_refuses_says_why(metal, monkeypatch) -> None:
    x, taps = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3, 3)
    metal.reason = "there is no metal here."
    assert gspn.available_impls(x)["metal"] == metal.reason
    assert implementations.resolve("auto", x, "line_scan").__name__ == "gspn.ops.cpu.line_scan"
    with pytest.raises(NotImplementedError, match="impl='metal' cannot run line_scan here: there is no metal here"):
        gspn.line_scan(x, taps, direction="down", impl="metal")
    metal.reason = backend.NotInstalled("there is no metal here; pip install metal.")
    with pytest.raises(ImportError, match="pip install metal"):
        gspn.line_scan(x, taps, direction="down", impl="metal")
    # The warning names the fastest backend that is made for the device, and then the fastest of all.
    monkeypatch.setattr(implementations, "_auto_choice", {})
    monkeypatch.setattr(IMPLEMENTATIONS["cpu"], "why_not", lambda *_: "it is broken.")
    with pytest.warns(RuntimeWarning, match="slow PyTorch loop on cpu.*metal cannot run, there is no metal"):
        gspn.line_scan(x, taps, direction="down")
    with pytest.warns(RuntimeWarning, match="slow PyTorch loop on meta.*metal cannot run, there is no metal"):
        implementations.resolve("auto", x.to("meta"), "line_scan")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_backend_keeps_the_protocol(name) -> None:
    module = IMPLEMENTATIONS[name]
    assert isinstance(module.DEVICES, tuple)
    assert list(inspect.signature(module.why_not).parameters) == ["device", "dtype", "op"]
    for op, protocol in PROTOCOLS.items():
        if name == "triton" and importlib.util.find_spec("triton") is None:
            continue
        functions: ModuleType = importlib.import_module(f"{module.__name__}.{op}")
        for function in (op, f"{op}_backward"):
            expected = list(inspect.signature(getattr(protocol, function)).parameters)[1:]
            assert list(inspect.signature(getattr(functions, function)).parameters)[: len(expected)] == expected


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_backend_imports_what_all_of_them_share_and_no_other_backend(name) -> None:
    shared = {"backend", "directions", "stochastic_taps", "unfused", "valid_size", "validation"}
    for path in Path(str(IMPLEMENTATIONS[name].__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert (node.module or "").split(".")[0] in shared, f"{path}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("gspn"), f"{path}: {ast.unparse(node)}"
