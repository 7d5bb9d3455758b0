"""Imports: those that ``import gspn`` causes, those the packages may have of one another, and the public names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, run_python


def test_import_needs_torch_alone_and_is_silent() -> None:
    done = run_python("""
import sys

class Refuse:
    blocked = {"timm", "diffusers", "triton", "typer", "rich", "matplotlib", "sklearn", "accelerate", "PIL", "yaml",
               "onnx", "onnxscript", "onnxruntime"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked and not any("torch/" in f for f in callers()):
            raise AssertionError(f"import gspn imports {name}")

def callers():
    frame = sys._getframe(2)
    while frame:
        yield frame.f_code.co_filename
        frame = frame.f_back

import torch
sys.meta_path.insert(0, Refuse())
import gspn
assert gspn.DIRECTIONS
import torch.cuda
assert not torch.cuda.is_initialized()
assert "gspn.cli" not in sys.modules
assert not any(name.startswith(("gspn.ops.triton.", "gspn.ops.cpu.line_scan")) for name in sys.modules)
""")
    assert done.stdout == ""
    assert done.stderr == ""


def test_calls_do_not_import_triton_on_cpu() -> None:
    run_python("""
import sys, torch
before = "triton" in sys.modules
import gspn
gspn.line_scan(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 2, 2), direction="down")
assert ("triton" in sys.modules) == before
""")


def test_imports_go_along_the_arrows() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    if not lint.exists() and shutil.which("lint-imports") is None:
        pytest.skip("import-linter is not installed; pip install 'gspn[dev]'")
    done = subprocess.run([str(lint), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_assert_for_users() -> None:
    # An assert vanishes under -O and shows nothing of the value.
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "src").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.lstrip().startswith("assert ")
    ]
    assert not offenders


PUBLIC = {
    "gspn": [
        "DIRECTIONS", "Direction", "__version__", "analysis", "available_impls", "line_scan", "propagate",
        "stochastic_taps",
    ],
    "gspn.nn": ["CompactGSPN2d", "GSPN2d", "GSPNBlock", "GSPNMixer", "SelfAttention2d"],
    "gspn.models": ["GSPN", "GSPNDenoiser2DModel"],
    "gspn.diffusers": ["ClassConditionalPipeline", "GSPNAdapter", "GSPNDenoiser2DModel", "GSPNTokenMixer"],
    "gspn.timm": ["GSPNAdapter", "GSPNTokenMixer"],
    "gspn.export": ["to_onnx", "to_pt2"],
    "gspn.analysis": [
        "Cost", "ImageInfluence", "Influence", "ScanStability", "affinity_matrix", "affinity_rows", "count_cost",
        "gspn2d_macs", "image_influence", "pixel_influence", "scan_stability", "stability_report", "write_stability",
    ],
}  # fmt: skip


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_surface(package) -> None:
    module = pytest.importorskip(package, reason="needs an extra of gspn", exc_type=ImportError)
    assert sorted(module.__all__) == PUBLIC[package]
    for name in PUBLIC[package]:
        getattr(module, name)


def test_the_directions() -> None:
    import gspn

    assert gspn.DIRECTIONS == ("down", "up", "right", "left")
