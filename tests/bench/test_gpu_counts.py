"""The parts of the counts: occupancy, executed instructions, predicted times, rows; and one kernel compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time

import pytest

from gspn.bench import gpu_counts
from gspn.bench.gpu_cases import Case, all_cases, default_cases
from gspn.bench.gpu_model import CARDS, Executed, Repeat, execute, predict, programs_side_by_side
from gspn.bench.sass import Instruction, Loop
from gspn.ops.triton.launch import TENSOR_CORES
from support import run_python

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared_memory", "programs"),
    [
        (90, 32, 4, 0, 16),  # 64 warps
        (90, 32, 1, 0, 32),  # 32 programs
        (86, 32, 4, 0, 12),  # 48 warps
        (90, 128, 16, 0, 1),
        (90, 129, 16, 0, 0),  # 17408 registers of a quarter's 16384
        (90, 249, 2, 0, 4),
        (90, 163, 4, 7168, 3),
        (90, 32, 4, 112 << 10, 2),  # 226 KB with what the system takes
        (90, 32, 4, 114 << 10, 1),
        (90, 32, 4, 227 << 10, 1),
        (90, 32, 4, (227 << 10) + 1, 0),
        (120, 32, 4, 99 << 10, 1),
    ],
)
def test_programs_side_by_side(arch: int, registers: int, warps: int, shared_memory: int, programs: int) -> None:
    assert programs_side_by_side(CARDS[arch], registers, warps, shared_memory) == programs


def loop(trips: int | None, *body: str | Loop) -> Loop:
    """A loop of lines of code and other loops."""
    code = [Instruction(0, None, *one.partition(" ")[::2]) if isinstance(one, str) else one for one in body]
    return Loop(0, code, trips)


INNER = loop(8, "LDS R5, [R8]", "FFMA R6, R5, R4, R6", "BRA `(.L_x_1)")
LINES = loop(
    None, "LDG.E R4, desc[UR4][R2.64]", "CS2R R8, SRZ", INNER, "BAR.SYNC 0x0", "STG.E.128 desc[UR4][R2.64], R4",
    "BRA `(.L_x_2)",
)  # fmt: skip
NESTED = loop(1, "S2R R0, SR_TID.X", "MOV R7, RZ", LINES, "EXIT")


def test_executed_instructions() -> None:
    executed = execute(NESTED, [Repeat(10)])
    assert executed.once == {"integer": 2, "control": 1}
    assert executed.repeated["fma"] == 10 * 8
    assert executed.repeated["barrier"] == 10
    assert executed.repeated["control"] == 10 * (1 + 8)
    assert executed.global_bytes == 10 * (4 + 16)
    assert executed.note == ""
    # The load is used in the inner loop, three instructions on.
    assert executed.exposed == pytest.approx(10 * (700 - 1.6 * 3))


def test_an_unexpected_loop_is_noted() -> None:
    assert "1 loops where 2 were expected" in execute(NESTED, [Repeat(10), Repeat(2)]).note
    assert "1 loops where 0 were expected" in execute(NESTED, []).note


def test_predicted_time() -> None:
    card = CARDS[90]
    executed = Executed()
    executed.repeated.update(fma=900, barrier=100)
    executed.exposed = 500.0
    times = predict(card, executed, programs=132 * 6, warps=4, side_by_side=2, moved=2948 * 10**6)
    cycle = 1e-6 / card.clock
    assert times.issue == pytest.approx(6 * 4 * 1000 / 3.2 * cycle)
    assert times.multiply_adds == pytest.approx(6 * 4 * 900 / 4 * cycle)
    assert times.matrix_products == 0
    assert times.latency == pytest.approx(3 * (1.6 * 1000 + 28 * 100 + 500) * cycle)
    assert times.bytes == pytest.approx(1.0)
    assert times.total == times.bytes
    assert times.bound == "bytes"
    executed.repeated.update(matrix=900)
    products = predict(card, executed, programs=132 * 6, warps=4, side_by_side=2, moved=0)
    assert products.matrix_products == pytest.approx(6 * 4 * 900 * 1024 / 640 * cycle)
    assert products.bound == "matrix_products"


@pytest.mark.parametrize(("arch", "make_maps"), [(80, True), (86, False), (90, True), (100, True), (120, False)])
def test_whose_tensor_cores_make_maps(arch: int, make_maps: bool) -> None:
    assert CARDS[arch].tensor_cores == make_maps == (divmod(arch, 10) in TENSOR_CORES)


def test_names_of_cases_are_their_own() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert {case.name for case in default_cases()} <= set(names)


def test_floors_of_the_formula() -> None:
    case, card = Case("propagate", 32, 1152, 74), CARDS[90]
    multiply_adds, special = case.floors(card)
    assert multiply_adds == pytest.approx(1.26, rel=0.01)
    assert special == pytest.approx(0.87, rel=0.01)


def test_jobs_runin_processes_that_can_be_ended() -> None:
    def never_ends() -> None:
        while True:
            pass

    def starts_one_that_waits() -> None:
        subprocess.run(["sleep", "61.25"], check=False)

    def raises() -> None:
        raise KeyError("a name\nand more")

    def dies() -> None:
        os._exit(3)

    # The one that waits uses no processor time: it is ended after ten times as long.
    jobs = {
        "never ends": never_ends,
        "waits": starts_one_that_waits,
        "raises": raises,
        "dies": dies,
        "works": lambda: 7,
    }
    begin = time.monotonic()
    results = dict(gpu_counts.in_processes(jobs, workers=2, timeout=0.5))
    assert time.monotonic() - begin < 40
    assert results.pop("works") == 7
    assert {name: str(error) for name, error in results.items()} == {
        "never ends": "not compiled after 0.5 s",
        "waits": "not compiled after 0.5 s",
        "raises": "KeyError: 'a name\\nand more'",
        "dies": "the compiler's process died",
    }
    assert not subprocess.run(["pgrep", "-f", "^sleep 61.25$"], capture_output=True, check=False).stdout


@needs_triton
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_launches_are_those_of_the_operators(layout: str) -> None:
    card = CARDS[90]
    few, others = Case("propagate", 2, 64, 20, "bf16", layout).call(card)
    assert [launch.kernel.__name__ for launch in few] == ["pack_kernel", "scan_kernel", "sum_kernel"]
    assert others == 1
    (pack, *scans), others = Case("propagate", 64, 96, 56, "bf16", layout).call(card)
    assert pack.kernel.__name__ == "pack_kernel"
    assert [launch.plan.constants["REVERSE"] for launch in scans] == [False, True, False, True]
    assert others == 1
    assert len(Case("line_scan", 2, 64, 20, direction="left", mode="backward").call(card)[0]) == 1


@needs_triton
def test_a_call_is_counted_once(tmp_path) -> None:
    """In a process without the interpreter: a kernel is compiled, and a second run finds its row in the file."""
    code = f"""
from pathlib import Path
from gspn.bench import gpu_counts
from gspn.bench.gpu_cases import Case

path = Path({str(tmp_path / "counts.csv")!r})
case = Case("line_scan", 16, 8, 1024, direction="down")
rows = gpu_counts.count_cases([case], [90], path)
assert [row["launch"] for row in rows] == [0, "all"]
row, call = rows
assert row["kernel"] == "line_scan" and row["stack"] == 0 and row["note"] == "", row
assert row["lanes"] == 1 and row["barriers_a_line"] == 2 and row["overlap"] == "yes" and row["groups_left"] > 0, row
assert 20 < row["total"] < 40 and row["mufu"] == 0 and 4 <= row["fma"] <= 6, row
assert row["bytes"] == 6 * 16 * 8 * 1024**2 * 4, row
assert call["triton_launches"] == 1 and call["other_launches"] == 0 and call["predicted_ms"] == row["predicted_ms"]
written = path.read_text()
gpu_counts.compile_launch = None  # nothing is compiled again
again = gpu_counts.count_cases([case], [90], path)
assert [str(row["total"]) for row in again] == [str(row["total"]) for row in rows]
path.write_text(written.replace(row["key"], "of other code"))
failed = gpu_counts.count_cases([case], [90], path)
assert "NoneType" in failed[0]["note"], failed
"""
    run_python(code, TRITON_INTERPRET="0")
