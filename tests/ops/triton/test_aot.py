"""The Triton kernels compiled ahead of time for cards that need not be here, and what the assembler says about them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from support import ROOT, run_python

_TRITON = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(_TRITON is None, reason="triton is not installed")

SMALL, LARGE = (8, 96, 56, 56), (16, 8, 1024, 1024)

# Dtype, direction, backward. Any two of card, dtype, backward and axis of the lines meet in all their values.
LINE_SCAN = {
    80: [("float32", "down", False), ("float32", "left", True), ("bfloat16", "up", True)],
    90: [("float32", "down", True), ("bfloat16", "left", True), ("float32", "right", False), ("bfloat16", "up", False)],
    100: [("bfloat16", "down", True), ("float32", "up", False), ("bfloat16", "right", False)],
}  # fmt: skip

# Shape, dtype, direction, S, G, channels_last. A direction differs from its reverse in the order of lines alone.
PROPAGATE = [
    (SMALL, "float32", "down", 8, 1, False),
    (SMALL, "bfloat16", "left", 8, 96, False),
    (SMALL, "float32", "left", 8, 96, True),
    (SMALL, "float32", "down", 64, 96, True),
    (LARGE, "float32", "left", 2, 8, False),
    (LARGE, "bfloat16", "down", 16, 1, False),
]
# The scan that only recomputes the states is the forward one with less to do.
KINDS = ("forward", "adjoint", "gradients")


def _run(call: str, cache: Path) -> str:
    paths = [str(ROOT / "tests"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths}; import compiled; compiled.{call}"
    return run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)).stdout


def _resources(cases: list, capability: int, cache: Path) -> list[tuple[str, dict[str, int]]]:
    """Each case, in words, and what it uses; none of them spills registers or asks for more than the card has."""
    if _TRITON is None or not (Path(str(_TRITON.origin)).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this triton comes without cuobjdump, which tells what a kernel uses")
    results = json.loads(_run(f"report({cases}, {capability})", cache))
    described = [(f"sm_{capability} {case}: {used}", used) for case, used in zip(cases, results, strict=True)]
    for what, used in described:
        assert used["stack"] == used["local"] == 0, what
        assert used["shared_memory"] <= {80: 163, 90: 227, 100: 227}[capability] * 1024, what
        assert used["registers"] * used["warps"] * 32 <= 65536, what
    return described


@pytest.mark.parametrize("capability", LINE_SCAN)
def test_line_scan_does_not_spill_and_accesses_are_wide(capability: int, triton_cache: Path) -> None:
    cases = [(LARGE, *case) for case in LINE_SCAN[capability]]
    for (_, dtype, direction, backward), (what, used) in zip(
        cases, _resources(cases, capability, triton_cache), strict=True
    ):
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


@pytest.mark.parametrize(("i", "capability"), enumerate((90, 80, 100)))
def test_propagate_does_not_spill(i: int, capability: int, triton_cache: Path) -> None:
    # A Latin square: any two of card, case and kernel meet.
    cases = [(*case, KINDS[(i + j) % 3]) for j, case in enumerate(PROPAGATE)]
    _resources(cases, capability, triton_cache)


def test_one_compilation_for_all_sizes(triton_cache: Path) -> None:
    _run("one_compilation_for_all_sizes()", triton_cache)
