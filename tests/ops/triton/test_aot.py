"""The Triton kernels compiled ahead of time for cards that need not be here, and what the assembler says about them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from support import ROOT, run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _run(call: str, cache: Path) -> str:
    paths = [str(ROOT / "tests"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths}; import compiled; compiled.{call}"
    return run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)).stdout


def _cases(dtype: str, *directions: str) -> list[tuple[str, str, bool]]:
    return [(dtype, direction, backward) for direction in directions for backward in (False, True)]


def _has_cuobjdump() -> bool:
    triton = importlib.util.find_spec("triton")
    return (
        triton is not None
        and triton.origin is not None
        and (Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump").exists()
    )


@pytest.mark.parametrize(
    ("capability", "cases"),
    [
        # "right" differs from "left" in the order of the lines alone, and takes as long to compile.
        (80, [*_cases("float32", "down", "left"), *_cases("bfloat16", "down")]),
        (90, _cases("float32", "down", "up", "right", "left")),
        (90, [*_cases("bfloat16", "down", "up", "left")]),
        (100, [*_cases("float32", "down", "left"), *_cases("bfloat16", "down"), ("bfloat16", "right", False)]),
    ],
    ids=["sm_80", "sm_90-float32", "sm_90-bfloat16", "sm_100"],
)
def test_no_spills_and_wide_accesses(capability: int, cases: list, tmp_path: Path) -> None:
    if not _has_cuobjdump():
        pytest.skip("this triton comes without cuobjdump, which tells what a kernel uses")
    results = json.loads(_run(f"report({cases}, {capability}, {str(tmp_path)!r})", tmp_path))
    most = {80: 163, 90: 227, 100: 227}[capability] * 1024
    for (dtype, direction, backward), used in zip(cases, results, strict=True):
        what = f"sm_{capability} {dtype} {direction} {backward=}: {used}"
        assert used["stack"] == used["local"] == 0, what
        assert used["shared_memory"] <= most, what
        assert used["registers"] * used["warps"] * 32 <= 65536, what
        # All that is read is read ahead, by copies of four pixels at least; only a line beside a tile is not.
        tensors = 7 if backward else 5
        wide = used["copies_of_16_bytes"] + (used["copies_of_8_bytes"] if dtype == "bfloat16" else 0)
        assert wide >= 2 * tensors, what
        assert used["copies"] - wide <= (4 if direction in ("left", "right") else 0), what
        assert used["stores"] - used["wide_stores"] <= (1 if direction in ("left", "right") else 0), what
        # Two barriers to exchange neighbours for each line of a tile, and those that order the copies.
        lines = 1 if direction in ("down", "up") else 8 if dtype == "float32" else 16
        assert used["barriers"] <= 2 * lines + 6, what
        assert used["shuffles"] == 0, what


def test_one_compilation_for_all_sizes(tmp_path: Path) -> None:
    _run("one_compilation_for_all_sizes()", tmp_path)
