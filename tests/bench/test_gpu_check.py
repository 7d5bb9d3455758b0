"""The program for the first minutes with a GPU, rehearsed in Triton's interpreter, and what survives its failures."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gspn.bench.gpu_check import (
    ERROR,
    FAIL,
    MEMORY,
    OK,
    SKIPPED,
    Context,
    Job,
    Step,
    Table,
    read_rows,
    run_steps,
    supervise,
)
from gspn.bench.gpu_model import CARDS
from gspn.bench.gpu_page import write_page
from gspn.ops.triton.planner import Limits
from support import ROOT, run_python

SCRIPT = ROOT / "scripts" / "gpu_check.py"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(torch.device("cpu"), CARDS[90], 90, Limits(), Table(tmp_path / "part1.csv", 1), rehearsal=True)


def statuses(path: Path) -> list[tuple[str, str]]:
    return [(row["case"], row["status"]) for row in read_rows(path)]


def in_script(code: str, tmp_path: Path, interpret: str = "1") -> None:
    """Run code in a process where ``program`` is the script and ``context`` one of a rehearsal."""
    run_python(
        f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
import gpu_check as program
from gspn.bench import gpu_steps
from gspn.bench.gpu_check import Context, Table
from gspn.bench.gpu_model import CARDS
LIMITS = program.limits_of(torch.device("cpu"))
table = Table(Path({str(tmp_path / "part1.csv")!r}), 1)
context = Context(torch.device("cpu"), CARDS[90], 90, LIMITS, table, rehearsal=True)
context.step = "2 correctness"
{code}""",
        TRITON_INTERPRET=interpret,
    )


@needs_triton
def test_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(SCRIPT), "--rehearsal", "--output", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {part: read_rows(tmp_path / f"part{part}.csv") for part in (1, 2)}
    steps = {part: list(dict.fromkeys(row["step"][:2].strip() for row in rows[part])) for part in rows}
    assert steps == {1: list("012356"), 2: ["0", "1", "2", "7", "9", "10", "4", "8"]}
    every = rows[1] + rows[2]
    assert {row["status"] for row in every} == {OK, SKIPPED}
    assert all(row["torch"] == torch.__version__ and row["device"] for row in every)
    skipped = {row["what"] for row in every if row["status"] == SKIPPED}
    assert skipped <= {"driver", "kernels", "compute-sanitizer", "ncu", "inference", "train"}
    checked = [row for row in every if row["step"] == "2 correctness" and row["bound"]]
    assert {row["what"] for row in checked} >= {"y", "h", "dx", "dproxy", "dtaps", "states left", "adjoint up"}
    assert all(0 <= float(row["error"]) <= float(row["bound"]) != 0 for row in checked)
    timed = [row for row in every if row["step"][:1] in "56" and row["what"] != "all launches"]
    assert all(float(row["ms"]) > 0 and float(row["bytes_ms"]) > 0 and row["plan"] for row in timed)
    assert not any(row["note"] for row in timed), "all of them were checked"
    kinds = {"forward", "states", "adjoint", "gradients of gates", "gradients of taps", "line_scan"}
    assert {row["kernel"] for row in timed} >= kinds
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img ") == 3
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"


@needs_triton
def test_wrong_results_are_red_and_not_timed(tmp_path: Path) -> None:
    """A kernel that is off by a thousandth, one that leaves an element out, and one that was not compiled in time."""
    in_script(
        """
from dataclasses import replace
import triton
import triton.language as tl
from gspn.ops.triton import taps
from gspn.ops.triton.launch import Launch

rows = context.table.rows

@triton.jit
def off_by_a_thousandth(b, PTX: tl.constexpr):
    return tl.math.exp2(b) * 1.001

case, scan = program.timed_cases(True)[0], program.line_scan_cases(True)[0]
gpu_steps.check(context, case)
assert [row["status"] for row in rows] == ["ok", "ok"]
taps.exp2 = off_by_a_thousandth
gpu_steps.check(context, case)
assert [row["status"] for row in rows[2:]] == ["ok", "FAIL"], rows
context.attempt(case.name, "times", lambda: gpu_steps.time_launches(context, case))
assert rows[4]["status"] == "skipped" and "refused" in rows[4]["note"]

run = Launch.run

def without_the_last_program(self):
    run(replace(self, plan=replace(self.plan, grid=(self.plan.grid[0] - 1,))))

Launch.run = without_the_last_program
gpu_steps.check(context, scan)
assert [row["status"] for row in rows[5:]] == ["ok", "FAIL"] and "nan" in rows[6]["note"], rows

context.keep_compiled(["another kernel"])
gpu_steps.code_key = lambda launch, arch: "this kernel"
context.attempt(case.name, "", lambda: gpu_steps.check(context, case))
assert rows[7]["status"] == "skipped" and rows[7]["note"] == "1 of 1 kernels were not compiled in time", rows[7:]
""",
        tmp_path,
    )
    write_page(tmp_path)
    assert (tmp_path / "index.html").read_text().count('<tr class="wrong">') == 4  # in its step, and on top


def test_a_failure_costs_its_own_row(context: Context) -> None:
    def raises(error: Exception):
        raise error

    def run(context: Context) -> None:
        context.attempt("one", "", lambda: {"ms": 1.0})
        context.attempt(
            "two", "", lambda: raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"))
        )
        context.attempt("three", "", lambda: raises(ValueError("of shape")))
        context.attempt("four", "", lambda: {"ms": 2.0})

    jobs = [Job("first", run), Job("second", lambda context: raises(torch.OutOfMemoryError())), Job("third", run)]
    run_steps(context, [Step("5 launches", 60, jobs)])
    of_run = [("one", OK), ("two", MEMORY), ("three", ERROR), ("four", OK)]
    assert statuses(context.table.path) == [*of_run, ("second", MEMORY), *of_run]
    notes = [row["note"] for row in read_rows(context.table.path)]
    assert notes[1:3] == ["CUDA out of memory. Tried to allocate", "ValueError: of shape"]


def test_a_step_ends_when_its_time_is_over(context: Context) -> None:
    context.rehearsal = False
    slow = Job("slow", lambda context: context.attempt("slow", "", lambda: time.sleep(0.05) or {}))
    run_steps(context, [Step("2 a", 0.01, [slow, Job("late", slow.run)]), Step("3 b", 60, [slow])])
    assert [(row["step"], row["status"]) for row in read_rows(context.table.path)] == [
        ("2 a", OK), ("2 a", SKIPPED), ("3 b", OK)
    ]  # fmt: skip


WORKER = """
import os, sys, time, torch
from pathlib import Path
from gspn.bench.gpu_check import Context, Job, Step, Table, run_steps
from gspn.bench.gpu_model import CARDS

context = Context(torch.device("cpu"), CARDS[90], 90, None, Table(Path(sys.argv[1]), 1))
jobs = {
    "works": lambda context: context.attempt("works", "", lambda: {"ms": 1.0}),
    "crashes": lambda context: os.abort(),
    "hangs": lambda context: time.sleep(1000),
    "works too": lambda context: context.attempt("works too", "", lambda: {"ms": 1.0}),
}
run_steps(context, [Step("5 launches", 600, [Job(name, run) for name, run in jobs.items()])])
"""


def test_a_crash_and_a_hang_cost_a_row_each(tmp_path: Path) -> None:
    path = tmp_path / "part1.csv"
    left = supervise([sys.executable, "-c", WORKER, str(path)], path, seconds=600, silence=20)
    assert left == ""
    assert statuses(path) == [("works", OK), ("crashes", ERROR), ("hangs", ERROR), ("works too", OK)]


def test_a_part_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "part1.csv"
    sleeps = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert "over" in supervise(sleeps, path, seconds=0.3, silence=60)
    assert "exit code 4" in supervise([sys.executable, "-c", "raise SystemExit(4)"], path, seconds=60, silence=60)


def test_half_a_row_is_left_out(context: Context) -> None:
    context.attempt("whole", "", dict)
    with context.table.path.open("a") as file:
        file.write("1,5 launches,half")
    assert statuses(context.table.path) == [("whole", OK)]
    Table(context.table.path, 1).add({"case": "next", "status": OK})
    assert statuses(context.table.path) == [("whole", OK), ("next", OK)]


@needs_triton
def test_kernels_are_compiled_beforehand(tmp_path: Path) -> None:
    """The second time, the kernel is read from Triton's folder on the disk: no file is added to it."""
    in_script(
        f"""
import os
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path / "triton")!r}
from gspn.bench import gpu_counts
from gspn.bench.gpu_cases import Case

launch = Case("line_scan", 16, 8, 1024, states=0, direction="down").call(CARDS[90])[0][0]
program.launches_of_part = lambda context, part: [launch, launch]
program.compile_all(context.table.path, 1, 90, CARDS[90])
kernels = {{one: one.stat().st_mtime_ns for one in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}}
assert kernels
program.compile_all(context.table.path, 1, 90, CARDS[90])
assert kernels == {{one: one.stat().st_mtime_ns for one in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}}
assert context.compiled == {{gpu_counts.code_key(launch, 90)}}
""",
        tmp_path,
        interpret="0",
    )


@needs_triton
def test_the_kernels_that_are_checked_are_those_that_are_timed(tmp_path: Path) -> None:
    """Of every third case, planned on the meta device: a smaller call has the kernels of the whole one."""
    in_script(
        """
from gspn.ops.triton.launch import limits_of, planned

cases = [*program.timed_cases(False), *program.line_scan_cases(False)][::3]
assert len(cases) > 15 and sum(gpu_steps.smaller(case) != case for case in cases) > 10
for case in cases:
    with planned((case.batch, case.channels)):
        limits = limits_of(torch.device("cpu"))
    small = gpu_steps.smaller(case).call(CARDS[90], limits)[0]
    gpu_steps._same_kernels(small, case.call(CARDS[90], LIMITS)[0])
""",
        tmp_path,
        interpret="0",
    )


TOOL = """#!/bin/sh
case "$0 $*" in
*racecheck*) echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit 9;;
*compute-sanitizer*) echo "========= ERROR SUMMARY: 0 errors";;
*) echo "==PROF== Connected"
echo '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"'
echo '"","","us","register/thread"'
echo '"0","scan_kernel","812.5","80"';;
esac
"""


@needs_triton
def test_tools(tmp_path: Path) -> None:
    """Stand-ins for both tools: their findings are rows, and a race is red."""
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / name).write_text(TOOL)
        (tmp_path / name).chmod(0o755)
    in_script(
        f"""
import os
os.environ["PATH"] = {str(tmp_path)!r} + ":" + os.environ["PATH"]
program.METRICS = {{"gpu__time_duration.sum": "time", "launch__registers_per_thread": "registers"}}
program.sanitize(context)
program.profile(context)
""",
        tmp_path,
    )
    found = {row["what"]: (row["status"], row["note"]) for row in read_rows(tmp_path / "part1.csv")}
    assert found["memcheck"] == found["initcheck"] == (OK, "ERROR SUMMARY: 0 errors")
    assert found["racecheck"] == (FAIL, "RACECHECK SUMMARY: 1 hazard displayed")
    assert found["scan_kernel"] == (OK, "time 812.5 us, registers 80 register/thread")
    assert found["ncu"] == (OK, "1 launches")
    assert (tmp_path / "racecheck.log").exists()


@needs_triton
def test_runs_from_a_source_tree_that_is_not_installed(tmp_path: Path) -> None:
    """No package but torch and triton, no metadata of gspn, no compiled library."""
    run_python(
        f"""
import importlib.metadata, sys

for name in ("timm", "diffusers", "matplotlib", "rich", "typer", "numpy", "torchvision", "accelerate"):
    sys.modules[name] = None
found = importlib.metadata.distribution
def distribution(name):
    if name == "gspn":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_check as program
import gspn, torch
from pathlib import Path
from gspn.bench.environment import describe
from gspn.bench.gpu_check import Context, Table
from gspn.bench.gpu_model import CARDS
from gspn.ops.cpu import library
assert gspn.__version__ == "unknown"
library._path = lambda: Path("nowhere.so")
assert describe(torch.device("cpu")).isa is None
folder = Path({str(tmp_path)!r})
context = Context(torch.device("cpu"), CARDS[90], 90, program.Limits(), Table(folder / "part2.csv", 2))
assert len(list(program.launches_of_part(context, 2))) > 100
program.model(context, "gspn_tiny", 224, 64, "train")
assert context.table.rows[0]["note"] == "timm is not installed", context.table.rows
assert "No plots" in program.write_page(folder).read_text()
""",
        TRITON_INTERPRET="0",
    )
