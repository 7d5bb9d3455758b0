"""The Triton kernels of propagate compiled ahead of time for cards that need not be here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from support import ROOT, run_python

_TRITON = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(_TRITON is None, reason="triton is not installed")

SMALL, LARGE = (8, 96, 56, 56), (16, 8, 1024, 1024)
# Shape, S, G, dtype, direction, channels_last. A direction differs from its reverse in the order of lines alone.
CASES = [
    (SMALL, 8, 1, "float32", "down", False),
    (SMALL, 8, 96, "bfloat16", "left", False),
    (SMALL, 8, 96, "float32", "left", True),
    (SMALL, 64, 96, "float32", "down", True),
    (LARGE, 2, 8, "float32", "left", False),
    (LARGE, 16, 1, "bfloat16", "down", False),
]


@pytest.mark.parametrize(
    ("capability", "cases"), [(80, CASES[:4]), (90, CASES), (100, CASES[:4])], ids=["sm_80", "sm_90", "sm_100"]
)
def test_no_spills(capability: int, cases: list, tmp_path: Path) -> None:
    if _TRITON is None or not (Path(str(_TRITON.origin)).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this triton comes without cuobjdump, which tells what a kernel uses")
    paths = [str(ROOT / "tests"), str(Path(__file__).parent)]
    # The scan that only recomputes the states is the forward one with less to do.
    which = ("forward", "adjoint", "gradients")
    call = f"report({cases}, {capability}, {str(tmp_path)!r}, *{which})"
    code = f"import sys; sys.path[:0] = {paths}; import propagate_compiled; propagate_compiled.{call}"
    found = run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).stdout
    results = json.loads(found)
    most = {80: 163, 90: 227, 100: 227}[capability] * 1024
    assert len(results) == 3 * len(cases)
    for i, used in enumerate(results):
        what = f"sm_{capability} {cases[i // 3]}: {used}"
        assert used["stack"] == used["local"] == 0, what
        assert used["shared_memory"] <= most, what
        assert used["registers"] * used["warps"] * 32 <= 65536, what
