"""The frame of ``scripts/gpu_check.py``: jobs that write a row each as they come, and what survives their failures.

A part is a list of jobs, which belong to steps with a budget of time. A worker process runs them in order. What a job
raises costs one row, and an error that leaves the device unusable costs the process: another one then continues after
the job that was under way, which it finds in the journal. :mod:`.gpu_steps` has the jobs, :mod:`.gpu_page` the page.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gspn._files import parse_json, read_json

from .environment import Environment
from .gpu_model import Card

if TYPE_CHECKING:
    from gspn.ops.triton.planner import Limits

Row = dict[str, Any]

COLUMNS = (
    *("part", "step", "case", "what", "status", "note", "ms", "samples", "bytes", "gbs", "of_copy"),
    *("bytes_ms", "fma_ms", "mufu_ms", "of_floor", "ratio", "tflops", "error", "plain_error", "bound"),
    *("kernel", "plan", "warps", "grid", "peak_mb", "seconds"),
)
"""The columns of the CSV, before those of the environment."""

OK, FAIL, ERROR, MEMORY, SKIPPED = "ok", "FAIL", "error", "out of memory", "skipped"
"""The states of a row: right or timed; wrong; an exception; too large for this card; not tried."""

_BROKEN = 3
"""The exit code of a worker whose device cannot be used any more."""


class WrongResultError(RuntimeError):
    """A result is not what it must be; the row says so in red."""


class NotHereError(RuntimeError):
    """Something that a job needs is not here; the row says what."""


class Table:
    """A CSV file that is written row by row, and the rows that it has."""

    def __init__(self, path: Path, part: int) -> None:
        self.path, self.part = path, part
        self.environment: Mapping[str, Any] = {}
        known = path.with_name("environment.json")
        if known.exists():
            self.environment = read_json(known)
        self.rows: list[Row] = read_rows(path)
        if not path.exists():
            self._write(None)
        elif not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")  # ends what a killed process left

    def add(self, row: Row) -> Row:
        """Write a row; it is in the file when this returns."""
        row = {**dict.fromkeys(COLUMNS, ""), **row}
        row = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
        self._write({"part": self.part, **row, **self.environment})
        self.rows.append(row)
        return row

    def _write(self, row: Row | None) -> None:
        columns = [*COLUMNS, *Environment.__dataclass_fields__]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader() if row is None else writer.writerow(row)


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a CSV: a last one that was cut off is left out. No rows where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


@dataclass
class Context:
    """The things that the jobs of a part share."""

    device: torch.device
    card: Card
    arch: int
    """The compute capability, as a number."""
    limits: Limits
    """Those that launches on this device are planned with."""
    table: Table
    rehearsal: bool = False
    """Whether the interpreter runs tiny shapes on the CPU."""
    step: str = ""
    """The step of the job that is under way."""

    def attempt(self, case: str, what: str, measure: Callable[[], Row | None], **fixed: Any) -> Row:
        """The row that ``measure`` returns or, where it raises, one that says what was raised."""
        begin = time.monotonic()
        row: Row = {"step": self.step, "case": case, "what": what, **fixed}
        try:
            row |= {"status": OK} | (measure() or {})
        except torch.OutOfMemoryError as error:
            row |= {"status": MEMORY, "note": _first_line(error)}
        except NotHereError as error:
            row |= {"status": SKIPPED, "note": str(error)}
        except WrongResultError as error:
            row |= {"status": FAIL, "note": str(error)}
        except Exception as error:
            row |= {"status": ERROR, "note": f"{type(error).__name__}: {_first_line(error)}"}
        row = self.table.add({**row, "seconds": time.monotonic() - begin})
        print(*(row[key] for key in ("step", "case", "what", "status", "note") if row[key]), flush=True)
        if row["status"] in (MEMORY, ERROR):
            self._recover()
        return row

    def skip(self, what: str, reason: str) -> None:
        """A row about something that is not tried."""
        self.table.add({"step": self.step, "what": what, "status": SKIPPED, "note": reason})

    def _recover(self) -> None:
        """Give the memory back; end the process if the device cannot be used any more."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except Exception:
                self.journal.over()  # its row is written
                os._exit(_BROKEN)  # destructors of tensors would fail again

    @functools.cached_property
    def journal(self) -> Journal:
        """The journal beside the CSV."""
        return Journal(self.table.path.with_suffix(".journal"))

    @property
    def copy_gbs(self) -> float | None:
        """The copy bandwidth that this part, or the last run of it, has measured."""
        speeds = [float(row["gbs"]) for row in self.table.rows if row["what"] == "copy" and row.get("gbs")]
        return speeds[-1] if speeds else None

    def refuse_if_wrong(self, case: str) -> str:
        """A note about the check of a case, empty if it was passed.

        Raises:
            NotHereError: a result was wrong, or the check failed; its time then means nothing.
        """
        statuses = {row["status"] for row in self.table.rows if row["case"] == case and row["step"].startswith("2")}
        if statuses & {FAIL, ERROR}:
            raise NotHereError("refused: the results of this case are wrong")
        return "" if OK in statuses else "its results were not checked"

    @property
    def compiled(self) -> frozenset[str] | None:
        """The kernels that have been compiled ahead of time, by their keys; None for the interpreter."""
        path = self.table.path.with_suffix(".compiled.json")
        return frozenset(read_json(path)) if path.exists() else None

    def keep_compiled(self, keys: Sequence[str]) -> None:
        """Note the kernels that have been compiled so far."""
        self.table.path.with_suffix(".compiled.json").write_text(json.dumps(keys), encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


@dataclass(frozen=True)
class Job:
    """Something to do, which adds rows by :meth:`Context.attempt`."""

    name: str
    run: Callable[[Context], object]


@dataclass(frozen=True)
class Step:
    """Jobs that have a time together: after it those that have not begun are left out."""

    name: str
    seconds: float
    jobs: Sequence[Job] = field(default_factory=tuple)


class Journal:
    """The jobs that were begun, and when: what tells another process where to continue."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.entries: list[Row] = [parse_json(line, path.name) for line in text.splitlines()]

    def write(self, step: str, name: str, under_way: bool) -> None:
        """Note a job that begins now, or is left out or over."""
        self.entries.append({"time": time.time(), "step": step, "name": name, "under_way": under_way})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.entries[-1]) + "\n")

    def over(self) -> None:
        """Note that the last job is over."""
        self.write(self.entries[-1]["step"], self.entries[-1]["name"], False)

    def begun(self) -> set[tuple[str, str]]:
        """The jobs that were begun or left out."""
        return {(entry["step"], entry["name"]) for entry in self.entries}

    def began(self, step: str) -> float | None:
        """When the first job of a step began."""
        return next((entry["time"] for entry in self.entries if entry["step"] == step), None)


def run_steps(context: Context, steps: Sequence[Step]) -> None:
    """Run the jobs of all steps, without those that the journal of an earlier process has."""
    journal = context.journal
    if journal.entries and journal.entries[-1]["under_way"]:
        last = journal.entries[-1]
        context.table.add(
            {"step": last["step"], "case": last["name"], "status": ERROR, "note": "the process ended in this job"}
        )
    done = journal.begun()
    jobs = [(step, job) for step in steps for job in step.jobs]
    for step, job in jobs:
        if (step.name, job.name) in done:
            continue
        context.step = step.name
        began = journal.began(step.name)
        if began is not None and time.time() - began > step.seconds and not context.rehearsal:
            context.skip(job.name, f"the {step.seconds:g} s of this step are over")
            journal.write(step.name, job.name, under_way=False)
            continue
        journal.write(step.name, job.name, under_way=True)
        try:
            job.run(context)
        except Exception as error:
            context.attempt(job.name, "", functools.partial(_raise, error))
        journal.over()


def _raise(error: Exception) -> Row:
    raise error


def supervise(command: Sequence[str], path: Path, seconds: float, silence: float) -> str:
    """Run the worker of a part, and again where it ends before all jobs are done, until the time is over.

    Args:
        command: the worker, which calls :func:`run_steps`.
        path: the CSV of the part.
        seconds: for all of it.
        silence: the seconds after which a worker that neither begins a job nor writes a row is ended.

    Returns:
        Why jobs are left; an empty string if none is.
    """

    def sizes() -> list[int]:
        return [file.stat().st_size for file in sorted(path.parent.glob(f"{path.stem}.*"))]

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = last = sizes()
        process = subprocess.Popen(command, start_new_session=True)
        heard = time.monotonic()
        while (code := process.poll()) is None and time.monotonic() < min(end, heard + silence):
            time.sleep(0.1)
            if sizes() != last:
                last, heard = sizes(), time.monotonic()
        if code == 0:
            return ""
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers and profilers that it has started
            process.wait()
        elif sizes() == before:
            return f"the worker ends with exit code {code} before it begins a job"
    return f"the {seconds:g} s of this part are over"
