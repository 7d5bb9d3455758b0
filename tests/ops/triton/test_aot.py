"""The Triton kernels compiled ahead of time for cards that need not be here, and what the assembler says about them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from gspn.ops.triton import _AMD
from support import ROOT, run_python

_TRITON = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(_TRITON is None, reason="triton is not installed")

# Dtype, direction, pass. Any two of card, dtype, pass and axis of the lines meet in all their values.
LINE_SCAN = {
    80: [("fp32", "down", "forward"), ("fp32", "left", "backward"), ("bf16", "up", "backward")],
    90: [
        ("fp32", "down", "backward"), ("bf16", "left", "backward"), ("fp32", "right", "forward"),
        ("bf16", "up", "forward"),
    ],
    120: [("bf16", "down", "backward"), ("fp32", "up", "forward"), ("bf16", "right", "forward")],
}  # fmt: skip

SMALL, LARGE = {"batch": 16, "channels": 96, "size": 56}, {"batch": 16, "channels": 8, "size": 1024}
FEW = {"batch": 2, "channels": 320, "size": 64}  # few enough rows for all directions to run side by side
# Calls of propagate, and which of their launches, not counting those that pack the proxy: a direction differs from its
# reverse in the order of lines alone. The scan that only recomputes the states is the forward one with less to do. A
# backward prepares factors; then come states, adjoint states and the gradients of gates and of taps: each for all
# directions of a small image, but of a large one all for each direction.
PROPAGATE = {
    80: [
        (SMALL | {"taps": "shared", "mode": "forward"}, [0]),
        (SMALL | {"dtype": "bf16", "mode": "backward"}, [6, 9, 10]),
        (LARGE | {"dtype": "bf16", "taps": "shared", "states": 16}, [0]),
        (FEW | {"dtype": "bf16", "layout": "channels_last"}, [0]),
    ],
    90: [
        (SMALL, [1]),
        (SMALL | {"dtype": "bf16"}, [3]),
        (SMALL | {"mode": "backward"}, [0, 6, 9, 10]),
        (SMALL | {"layout": "channels_last"}, [1, 3]),
        (LARGE | {"states": 2}, [3]),
        (FEW, [0]),
    ],
    120: [
        (SMALL | {"layout": "channels_last", "states": 64, "mode": "backward"}, [6, 10]),
        (LARGE | {"dtype": "bf16", "taps": "shared", "states": 2}, [1]),
        (LARGE | {"states": 2, "mode": "backward"}, [10, 11, 12]),
    ],
}

# Calls whose maps tensor cores make, their launches, and instructions of a warp for 32 elements. A backward makes the
# states of a direction and then its adjoint states.
SHORT = {"batch": 64, "channels": 96, "size": 56}
WARP_SCAN = {
    80: [(SHORT, [1], 36), (SHORT | {"dtype": "fp16", "states": 2, "size": 28}, [3], 45)],
    86: [(SHORT | {"dtype": "bf16", "states": 16, "size": 14}, [0], 70)],
    90: [
        (SHORT | {"size": 74}, [1, 3], 40),
        (SHORT | {"size": 74, "layout": "channels_last", "dtype": "bf16"}, [1], 50),
        (SHORT | {"size": 128, "states": 16, "layout": "channels_last"}, [3], 60),
        (SHORT | {"mode": "backward"}, [1, 10], 40),
    ],
    100: [(SHORT | {"taps": "shared"}, [0], 40)],
    120: [(SHORT | {"channels": 768, "size": 7, "dtype": "bf16"}, [3], 70)],
}

# Instructions of a warp for 32 elements by the channels of the proxy, and barriers of a line or tile.
SCAN = {2: 65, 8: 125, 16: 155}, 2
# With two channels of the proxy the image has eight channels, half of what a program of the gradients takes.
MOST = {
    "forward": SCAN,
    "adjoint": SCAN,
    "factors": ({8: 0}, 0),
    "gradients of gates": ({2: 220, 8: 145}, 5),
    "gradients of taps": ({2: 345, 8: 175}, 3),
}


def _run(call: str, cache: Path) -> str:
    paths = [str(ROOT / "tests"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths}; import compiled; compiled.{call}"
    return run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)).stdout


def _counts(
    chosen: list, arch: int, cache: Path, tensor_cores: bool = False
) -> list[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Each launch in words, and its counts; none of them spills registers or asks for more than the card has.

    The gradients' launches keep a few numbers in local memory that the loop over the tiles does not use. With a proxy
    of 64 channels it does use some.
    """
    if _TRITON is None or not (Path(str(_TRITON.origin)).parent / "backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("this triton comes without nvdisasm, which tells what a kernel is compiled to")
    rows = json.loads(_run(f"report({chosen}, {arch}, {tensor_cores})", cache))
    described = [(f"sm_{arch} {row['case']}: {row}", row) for row in rows]
    for what, row in described:
        assert row["note"] == "", what
        gradients, wide = row["kernel"].startswith("gradients"), "/s64/" in row["case"]
        assert row["stack"] <= (128 if wide else 32 if gradients else 0), what
        assert row["local"] <= (0.01 * row["total"] if wide else 0.1 if gradients else 0), what
        assert row["side_by_side"] >= (8 if gradients else 1), what
    return described


@pytest.mark.parametrize("arch", LINE_SCAN)
def test_line_scan_does_not_spill_and_accesses_are_wide(arch: int, triton_cache: Path) -> None:
    keys = ("dtype", "direction", "mode")
    cases = [
        {"op": "line_scan", "states": 0, **LARGE, **dict(zip(keys, case, strict=True))} for case in LINE_SCAN[arch]
    ]
    counts = _counts([(case, [0]) for case in cases], arch, triton_cache)
    for case, (what, row) in zip(cases, counts, strict=True):
        # All that is read is read ahead, by copies of four pixels at least; only a line beside a tile is not.
        tensors, along = 7 if case["mode"] == "backward" else 5, case["direction"] in ("left", "right")
        copies = {int(name.split()[1]): count for name, count in row["accesses"].items() if name.startswith("LDGSTS")}
        wide = copies.get(16, 0) + (copies.get(8, 0) if case["dtype"] == "bf16" else 0)
        assert wide >= 2 * tensors, what
        assert sum(copies.values()) - wide <= (4 if along else 0), what
        stores = {int(name.split()[1]): count for name, count in row["accesses"].items() if name.startswith("STG")}
        assert sum(count for size, count in stores.items() if size < 8) <= (1 if along else 0), what
        # Two barriers to exchange neighbours for each line of a tile, and those that order the copies.
        lines = 1 if not along else 8 if case["dtype"] == "fp32" else 16
        assert row["barriers_a_line"] <= 2 + 2 / lines, what
        assert row["shuffle"] == 0, what
        most = {("forward", False): 45, ("forward", True): 60, ("backward", False): 80, ("backward", True): 90}
        assert row["total"] <= most[case["mode"], along], what
        assert along or row["overlap"] == "yes", what


@pytest.mark.parametrize("arch", PROPAGATE)
def test_propagate_does_not_spill_and_is_no_longer(arch: int, triton_cache: Path) -> None:
    chosen = [({"op": "propagate", **case}, launches) for case, launches in PROPAGATE[arch]]
    cases = [case for case, launches in chosen for _ in launches]
    for case, (what, row) in zip(cases, _counts(chosen, arch, triton_cache), strict=True):
        instructions, barriers = MOST[row["kernel"]]
        states = case.get("states", 8)
        if states <= 16:
            assert row["total"] <= instructions[states], what
            assert row["barriers_a_line"] <= barriers, what


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_every_kernel_compiles(tensor_cores: bool, triton_cache: Path) -> None:
    """With the least Triton too, whose assembler may do worse than the bounds of the other tests."""
    backward = [1, 3, 6, 9, 10]
    calls = [
        ({"op": "line_scan", "states": 0, "direction": "down", "mode": "forward", **LARGE}, [0]),
        ({"op": "line_scan", "states": 0, "direction": "left", "mode": "backward", **LARGE}, [0]),
        ({"op": "propagate", "mode": "backward", **SMALL}, backward),
        ({"op": "propagate", **LARGE, "states": 2}, [3]),
    ]
    short = {"op": "propagate", **SHORT, "size": 74}
    chosen = [(short, [1]), (short | {"mode": "backward"}, [2])] if tensor_cores else calls
    rows = json.loads(_run(f"report({chosen}, 90, {tensor_cores})", triton_cache))
    assert [row["note"] for row in rows] == [""] * sum(len(launches) for _, launches in chosen)


@pytest.mark.parametrize("arch", WARP_SCAN)
def test_scans_by_tensor_cores_do_not_spill_and_have_no_barriers(arch: int, triton_cache: Path) -> None:
    chosen = [({"op": "propagate", **case}, launches) for case, launches, _ in WARP_SCAN[arch]]
    most = [most for _, launches, most in WARP_SCAN[arch] for _ in launches]
    for bound, (what, row) in zip(most, _counts(chosen, arch, triton_cache, tensor_cores=True), strict=True):
        assert "TILES" in row["plan"], what
        assert row["matrix"] > 0, what
        assert row["total"] <= bound, what
        assert row["barriers_a_line"] == row["shared"] == 0, what
        assert row["side_by_side"] * row["warps"] >= 8, what


def test_images_of_several_sizes_do_not_spill(triton_cache: Path) -> None:
    stacks = json.loads(_run("images_of_several_sizes(90)", triton_cache))
    assert len(stacks) == 6, stacks  # both line scans, a scan and its adjoint, the gradients of gates and of taps
    for kernel, stack in stacks:
        assert stack <= (32 if "gradients" in kernel else 0), (kernel, stack)


def test_little_is_done_on_the_host(triton_cache: Path) -> None:
    # Launches, PyTorch's kernels, calls of functions. A processor of 2025 takes some 0.1 us for a call.
    most = {"side by side": (3, 1, 150), "in turn": (5, 1, 280), "backward": (6, 6, 380)}
    for name, (*counts, microseconds) in json.loads(_run("host_work()", triton_cache)).items():
        assert all(count <= bound for count, bound in zip(counts, most[name], strict=True)), (name, counts)
        assert microseconds < 10_000, (name, microseconds)


def test_one_compilation_for_all_sizes(triton_cache: Path) -> None:
    _run("one_compilation_for_all_sizes()", triton_cache)


@pytest.mark.parametrize(("arch", "warp_size"), [("gfx942", 64), ("gfx1100", 32)])
def test_line_scan_compiles_for_amd(arch: str, warp_size: int, triton_cache: Path) -> None:
    assert arch in _AMD["line_scan"]
    cases = [{**LARGE, "dtype": "fp32", "direction": "down", "mode": "backward"}]
    cases.append({**LARGE, "dtype": "bf16", "direction": "right", "mode": "forward"})
    chosen = [({"op": "line_scan", "states": 0, **case}, [0]) for case in cases]
    for what, kernel, memory in json.loads(_run(f"for_amd({chosen}, {arch!r}, {warp_size})", triton_cache)):
        assert memory <= 64 << 10, (what, kernel)
