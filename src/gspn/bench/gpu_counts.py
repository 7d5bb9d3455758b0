"""Counts what the Triton kernels execute, compiled ahead of time for cards that need not be here.

A case is a call of an operator. It is made on the meta device with the limits of a card, so that what is compiled is
what the operator's own planner would launch there; :mod:`.sass` reads the machine code and :mod:`.gpu_model` says what
it costs. Every kernel is compiled once, in a process of its own, which is ended where it takes too long.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gspn._errors import UsageError
from gspn._files import replaced

from .environment import git_commit, package_version
from .gpu_cases import Case
from .gpu_model import CARDS, WORK, Card, Executed, Prediction, execute, predict, programs_side_by_side
from .sass import CLASSES, Loop, read_kernel

if TYPE_CHECKING:
    from gspn.ops.triton.launch import Launch

Row = dict[str, Any]

COLUMNS = (
    *("case", "launch", "kernel", "arch", "card", "plan", "warps", "grid", "programs_per_multiprocessor"),
    *("registers", "stack", "shared_memory", "side_by_side", "side_by_side_by", "lanes"),
    *("total", *CLASSES, "barriers_a_line", "copies_ahead", "loads_ahead", "groups_left", "overlap"),
    *("bytes", "issued_bytes", "bytes_ms", "issue_ms", "fma_ms", "mufu_ms", "latency_ms", "predicted_ms", "bound"),
    *("fma_floor_ms", "mufu_floor_ms", "triton_launches", "other_launches", "compile_s", "note"),
    *("triton", "commit", "key"),
)
"""The columns of the CSV. ``total`` and the classes are instructions of a warp in loops, for 32 pixels of use."""

# --- Compiling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A kernel's resources and code."""

    registers: int
    stack: int
    """Bytes that a thread has in local memory, which is where registers are spilled to."""
    shared_memory: int
    kernel: Loop
    seconds: float
    """Of processor time to compile it."""


def code_key(launch: Launch, arch: int) -> str:
    """A name for what a launch is compiled to: the same for launches that differ in sizes alone."""
    named = launch.arguments()
    kinds = {}
    for name, value in named.items():
        if isinstance(value, Tensor):
            kinds[name] = f"*{value.dtype} {value.data_ptr() % 16 == 0}"
        elif value is not None and name in launch.plan.integers:
            kinds[name] = "i32" if abs(value) < 2**31 else "i64"
        else:
            kinds[name] = repr(value)
    what = json.dumps([launch.kernel.cache_key, sorted(kinds.items()), arch, package_version("triton")])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def pretend(backend: str, arch: int | str, warp_size: int) -> None:
    """Let Triton compile for a card that is not here, for the rest of this process; it must be the only one."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """As much of a driver as compiling asks for."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(backend, arch, warp_size)

    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile a launch as calling it would, for a card of compute capability ``arch``, and read the result.

    A process can do so for one capability only; see :func:`pretend`.
    """
    pretend("cuda", arch, 32)
    begin = _processor_time()
    compiled = launch.kernel.warmup(**launch.arguments(), grid=launch.plan.grid)
    seconds = _processor_time() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        used = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", used)
    if numbers is None:
        raise RuntimeError(f"cuobjdump does not tell the resources of {launch.kernel.__name__}: {used.strip()}")
    return Compiled(int(numbers[1]), int(numbers[2]), compiled.metadata.shared, read_kernel(code), seconds)


def _compile_anew(launch: Launch, arch: int, cache: str) -> Compiled:
    """:func:`compile_launch` in a process of its own, without what Triton has kept: the time is to be true."""
    os.environ["TRITON_CACHE_DIR"] = cache
    return compile_launch(launch, arch)


def _processor_time() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def tools() -> Path:
    """The folder of NVIDIA's disassembler, which triton brings.

    Raises:
        UsageError: it is not there, or Triton's interpreter is on, which compiles nothing.
    """
    from gspn.ops.triton import interpreted

    if interpreted():
        raise UsageError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    try:
        import triton
    except ModuleNotFoundError:
        raise UsageError("this compiles Triton kernels and triton is not installed; pip install triton.") from None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name in ("nvdisasm", "cuobjdump"):
        if not (folder / name).exists():
            raise UsageError(f"{folder / name} is missing: this build of triton cannot read machine code.")
    return folder


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([tools() / name, *arguments], capture_output=True, text=True, check=True).stdout


def in_processes(
    jobs: Mapping[str, Callable[[], Any]], workers: int, timeout: float
) -> Iterator[tuple[str, Any | Exception]]:
    """The results of jobs by name, or what went wrong, as they come, each from a fork of this process.

    A job is ended after ``timeout`` seconds of processor time, so that other work on the machine changes nothing, and
    in any case after ten times as long.
    """
    context = multiprocessing.get_context("fork")

    def child(job: Callable[[], Any], result: Connection) -> None:
        os.setsid()  # with the assembler that it starts, it can be ended as a whole
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(timeout), math.ceil(timeout) + 1))
        try:
            result.send(job())
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            result.send(RuntimeError(f"{type(error).__name__}: {text[0]}"))

    waiting = list(jobs.items())[::-1]
    running: dict[Connection, tuple[str, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name, job = waiting.pop()
                receives, sends = context.Pipe(duplex=False)
                process = context.Process(target=child, args=(job, sends), daemon=True)
                process.start()
                sends.close()
                running[receives] = name, process, time.monotonic() + 10 * timeout
            first = min(deadline for _, _, deadline in running.values())
            ready = wait(list(running), max(first - time.monotonic(), 0))
            late = [one for one, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
            for connection in {*ready, *late}:
                name, process, _ = running.pop(connection)  # type: ignore[index]
                result: Any = None
                with closing(connection), contextlib.suppress(EOFError):  # type: ignore[type-var]
                    result = connection.recv() if connection in ready else None  # type: ignore[union-attr]
                process.join(0 if connection in late else None)
                if result is None and process.exitcode in (None, -signal.SIGXCPU, -signal.SIGKILL):
                    result = RuntimeError(f"not compiled after {timeout:g} s")
                _end(process)
                yield name, RuntimeError("the compiler's process died") if result is None else result
    finally:
        for _, process, _ in running.values():
            _end(process)


def _end(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# --- Rows -------------------------------------------------------------------------------------------------------------


def _side_by_side_by(card: Card, registers: int, warps: int, shared_memory: int) -> str:
    """Which resource limits the programs on a multiprocessor."""
    limits = {
        "registers": programs_side_by_side(card, registers, warps, 0),
        "shared memory": programs_side_by_side(card, 1, 1, shared_memory),
        "threads": programs_side_by_side(card, 1, warps, 0),
    }
    return min(limits, key=lambda name: limits[name])


def moved(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each argument once."""
    return sum(t.numel() * t.element_size() for t in launch.tensors.values() if t is not None)


def _rounded(row: Row) -> Row:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def launch_row(launch: Launch, compiled: Compiled | Exception, arch: int) -> Row:
    """The columns of a launch, without those that name it."""
    card, plan = CARDS[arch], launch.plan
    programs = math.prod(plan.grid)
    row: Row = {
        "kernel": launch.kernel.__name__,
        "plan": " ".join(f"{name}={value}" for name, value in plan.constants.items()),
        "warps": plan.num_warps,
        "grid": "x".join(map(str, plan.grid)),
        "programs_per_multiprocessor": programs / card.multiprocessors,
        "bytes": moved(launch),
    }
    work = WORK[launch.kernel.__name__](launch) if launch.kernel.__name__ in WORK else None
    if work is not None:
        row |= {"kernel": work.kind, "lanes": work.pixels / (programs * work.steps * work.slots)}
    if isinstance(compiled, Exception):
        return _rounded({**row, "note": str(compiled)})
    side_by_side = programs_side_by_side(card, compiled.registers, plan.num_warps, compiled.shared_memory)
    row |= {
        "registers": compiled.registers, "stack": compiled.stack, "shared_memory": compiled.shared_memory,
        "side_by_side": side_by_side, "compile_s": compiled.seconds,
        "side_by_side_by": _side_by_side_by(card, compiled.registers, plan.num_warps, compiled.shared_memory),
    }  # fmt: skip
    if work is None:
        return _rounded({**row, "note": f"gpu_model.WORK does not know {launch.kernel.__name__}"})
    executed = execute(compiled.kernel, work.loops)
    row |= _counted(executed, programs * plan.num_warps * 32 / work.pixels, work.steps)
    row |= _ahead(compiled.kernel)
    row["issued_bytes"] = int(executed.global_bytes * programs * plan.num_warps * 32)
    row |= _times(predict(card, executed, programs, plan.num_warps, side_by_side, row["bytes"]))
    return _rounded(row)


def _counted(executed: Executed, warps_for_32_pixels: float, steps: float) -> Row:
    counts = {name: executed.repeated[name] * warps_for_32_pixels for name in CLASSES}
    barriers = executed.repeated["barrier"] / steps
    return {"total": sum(counts.values()), **counts, "barriers_a_line": barriers, "note": executed.note}


def _ahead(kernel: Loop) -> Row:
    """How far ahead the loops over lines load: those whose number of iterations is not a constant, the innermost."""

    def innermost(loop: Loop) -> Iterator[Loop]:
        inside = [one for one in loop.loops if one.trips is None]
        yield from itertools.chain.from_iterable(map(innermost, inside)) if inside else [loop]

    distances = [loop.distances() for loop in innermost(kernel)]
    copies = [d.copies for d in distances if d.copies is not None]
    loads = [d.loads for d in distances if d.loads is not None]
    left = [d.groups_left for d in distances if d.groups_left is not None]
    length = min(sum(loop.own().values()) for loop in innermost(kernel))
    ahead = [*copies, *loads]
    return {
        "copies_ahead": min(copies, default=None), "loads_ahead": min(loads, default=None),
        "groups_left": min(left, default=None),
        # A load that is under way during half of an iteration or more.
        "overlap": "" if not ahead else "yes" if min(ahead) >= length / 2 else "no",
    }  # fmt: skip


def _times(predicted: Prediction) -> Row:
    return {
        "bytes_ms": predicted.bytes, "issue_ms": predicted.issue, "fma_ms": predicted.multiply_adds,
        "mufu_ms": predicted.special_functions, "latency_ms": predicted.latency, "predicted_ms": predicted.total,
        "bound": predicted.bound,
    }  # fmt: skip


def call_row(case: Case, rows: Sequence[Row], others: int, arch: int) -> Row:
    """The row of the whole call: sums of times and bytes, and of everything else the worst of its launches."""
    multiply_adds, special = case.floors(CARDS[arch])
    row: Row = {"kernel": "all", "triton_launches": len(rows), "other_launches": others}
    row |= {"fma_floor_ms": multiply_adds, "mufu_floor_ms": special}

    def present(name: str) -> list[Any]:
        return [float(one[name]) for one in rows if one.get(name) not in (None, "")]

    for name in ("bytes", "bytes_ms", "issue_ms", "fma_ms", "mufu_ms", "latency_ms", "predicted_ms"):
        if len(present(name)) == len(rows):
            row[name] = sum(present(name))
    for name in ("registers", "stack", "shared_memory", "total", *CLASSES, "barriers_a_line", "compile_s"):
        row[name] = max(present(name), default=None)
    for name in ("programs_per_multiprocessor", "side_by_side", "lanes", "copies_ahead", "loads_ahead"):
        row[name] = min(present(name), default=None)
    overlaps = {one.get("overlap") for one in rows} - {None, ""}
    row["overlap"] = "no" if "no" in overlaps else "yes" if overlaps else ""
    row["note"] = "; ".join(dict.fromkeys(str(one["note"]) for one in rows if one.get("note")))
    return _rounded(row)


@dataclass
class _Call:
    """A case on a card: its launches and their rows so far."""

    case: Case
    arch: int
    launches: list[Launch]
    others: int
    rows: dict[int, Row] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, arch: int) -> _Call:
        return cls(case, arch, *case.call(CARDS[arch]))

    def row(self, launch: int | str, rest: Row) -> Row:
        return {"case": self.case.name, "arch": self.arch, "card": CARDS[self.arch].name, "launch": launch, **rest}

    def total(self) -> Row:
        return self.row("all", call_row(self.case, list(self.rows.values()), self.others, self.arch))


class Table:
    """A CSV file of counts, written row by row. Rows that an earlier run has left there are not counted again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.constant: Row = {"triton": package_version("triton"), "commit": git_commit()}
        self.rows: list[Row] = []
        self.old: dict[tuple[str, str], dict[str, Row]] = {}
        if path is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise UsageError(f"{path} has not the columns that this version writes; move it, or name another.")
                for row in reader:
                    if None not in row.values():  # what a run left that was ended while it wrote
                        self.old.setdefault((row["case"], row["arch"]), {})[row["launch"]] = row

    def keep(self, case: str, arch: int, keys: Sequence[str]) -> dict[int, Row]:
        """The rows of an earlier run about launches with these keys; what else it says about the call is dropped."""
        old = self.old.pop((case, str(arch)), {})
        kept = {i: old[str(i)] for i, key in enumerate(keys) if old.get(str(i), {}).get("key") == key}
        self.rows += kept.values()
        return kept

    def begin(self) -> None:
        """Write what is kept: for calls that are counted now, and all rows of others."""
        self.rows += itertools.chain.from_iterable(rows.values() for rows in self.old.values())
        if self.path is not None:
            with replaced(self.path) as part:
                self._write(part, self.rows, header=True)

    def add(self, row: Row) -> None:
        """Append a row."""
        self.rows.append({**self.constant, **row})
        if self.path is not None:
            self._write(self.path, self.rows[-1:])

    @staticmethod
    def _write(path: Path, rows: Sequence[Row], header: bool = False) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if header:
                writer.writeheader()
            writer.writerows(rows)


def count_cases(
    cases: Sequence[Case], archs: Sequence[int], output: Path | None = None, *, workers: int = 1,
    timeout: float = 20, progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Row]:  # fmt: skip
    """Count the launches of cases: a row for each, and one for each call, in the file and as a result.

    Args:
        cases: the calls.
        archs: compute capabilities, of :data:`.gpu_model.CARDS`.
        output: the CSV file. Rows are written as they come; a later run with the same file continues it.
        workers: processes that compile.
        timeout: seconds of processor time after which a kernel is given up, which is noted in its row.
        progress: called with the kernels done and their total.

    Raises:
        UsageError: triton is not installed, or the file is one of another version.
    """
    tools()
    table = Table(output)
    waiting_for: dict[str, list[tuple[_Call, int, str]]] = {}
    finished: list[_Call] = []
    for arch, case in itertools.product(archs, cases):
        call = _Call.of(case, arch)
        codes = [code_key(launch, arch) for launch in call.launches]
        keys = [_row_key(code, launch) for code, launch in zip(codes, call.launches, strict=True)]
        call.rows = table.keep(case.name, arch, keys)
        for i, (code, key) in enumerate(zip(codes, keys, strict=True)):
            if i not in call.rows:
                waiting_for.setdefault(code, []).append((call, i, key))
        if len(call.rows) == len(codes):
            finished.append(call)
    table.begin()
    for call in finished:
        table.add(call.total())
    with tempfile.TemporaryDirectory() as cache:
        jobs = {
            code: functools.partial(_compile_anew, call.launches[i], call.arch, cache)
            for code, ((call, i, _), *_) in waiting_for.items()
        }
        for done, (code, compiled) in enumerate(in_processes(jobs, workers, timeout), 1):
            for call, i, key in waiting_for[code]:
                call.rows[i] = call.row(i, launch_row(call.launches[i], compiled, call.arch) | {"key": key})
                table.add(call.rows[i])
                if len(call.rows) == len(call.launches):
                    table.add(call.total())
            progress(done, len(jobs))
    return table.rows


def _row_key(code: str, launch: Launch) -> str:
    """A name for a row of counts: the code and the sizes."""
    what = json.dumps([code, launch.plan.grid, sorted(launch.plan.integers.items())])
    return hashlib.sha256(what.encode()).hexdigest()[:16]
