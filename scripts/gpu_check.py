"""Check and time the Triton kernels on a GPU, in two parts of at most five minutes; see docs/gpu.md.

    python scripts/gpu_check.py                       # both parts; writes runs/gpu/index.html
    TRITON_INTERPRET=1 python scripts/gpu_check.py --rehearsal   # tiny shapes on the CPU, to try the program itself

Runs from the source tree: it needs Python 3.11, torch and triton, and neither the compiled CPU kernels nor any extra.
"""

# ruff: noqa: E402  (the source tree comes first on the path)

from __future__ import annotations

import argparse
import csv
import functools
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch

from gspn.bench import gpu_cases, gpu_counts
from gspn.bench.environment import describe
from gspn.bench.gpu_cases import Case
from gspn.bench.gpu_check import (
    ERROR,
    FAIL,
    SKIPPED,
    Context,
    Job,
    NotHereError,
    Row,
    Step,
    Table,
    WrongResultError,
    run_steps,
    supervise,
)
from gspn.bench.gpu_model import CARDS, Card
from gspn.bench.gpu_page import write_page
from gspn.bench.gpu_steps import (
    Call,
    Place,
    cases_of,
    check,
    choices,
    kind_of,
    machine,
    model,
    model_launches,
    operator,
    repeat,
    sweep,
    time_launches,
)
from gspn.bench.propagate import PropagateSweep
from gspn.ops.directions import DIRECTIONS
from gspn.ops.triton import interpreted
from gspn.ops.triton.launch import Launch, limits_of
from gspn.ops.triton.planner import Limits

LIMITS, REHEARSAL_LIMITS = (290, 75), (1800, 600)
"""The seconds of a part, and those after which a worker that neither begins a job nor writes a row is ended."""
COMPILING, TOOL_SECONDS = 45, 40

# --- The parts --------------------------------------------------------------------------------------------------------

MODEL, MODEL_SIZE, MODEL_BATCH = "gspn_tiny", 224, 64


def timed_cases(rehearsal: bool) -> list[Case]:
    """The calls of ``propagate`` that are checked and timed, the most telling ones first."""
    if rehearsal:
        tiny = Case("propagate", 3, 2, 3, states=2)
        return [
            tiny,
            replace(tiny, mode="backward"),
            replace(tiny, dtype="bf16", layout="channels_last", taps="shared"),
        ]
    shapes = gpu_cases.LARGE + gpu_cases.SMALL
    few = (gpu_cases.LARGE[0], gpu_cases.LARGE[2], gpu_cases.LARGE[4])

    def cases(dtype: str, layout: str, mode: str, taps: str, of: Sequence[tuple[int, int, int]] = shapes) -> list[Case]:
        return [Case("propagate", *shape, dtype, layout, taps, mode=mode) for shape in of]

    return [
        *cases("fp32", "nchw", "forward", "per-channel"),
        *cases("fp32", "nchw", "backward", "per-channel"),
        *cases("fp32", "channels_last", "forward", "per-channel"),
        *cases("bf16", "nchw", "forward", "shared"),
        *cases("bf16", "channels_last", "forward", "shared"),
        *cases("fp32", "channels_last", "backward", "shared"),
        *cases("bf16", "nchw", "backward", "per-channel", few),
        *cases("bf16", "channels_last", "backward", "per-channel", few),
    ]


def line_scan_cases(rehearsal: bool) -> list[Case]:
    """The calls of ``line_scan`` that are checked and timed."""
    scan = Case("line_scan", 1, 2, 3, states=0) if rehearsal else Case("line_scan", 16, 8, 1024, states=0)
    some = [
        replace(scan, dtype=dtype, mode=mode, direction=direction)
        for dtype, mode, direction in itertools.product(("fp32", "bf16"), gpu_cases.MODES, DIRECTIONS)
    ]
    return some[::5] if rehearsal else some


def repeated_cases(rehearsal: bool) -> list[Case]:
    """The calls whose results must always be the same."""
    if rehearsal:
        return timed_cases(True)[:1]
    patches, stage, wide = (Case("propagate", *gpu_cases.LARGE[i]) for i in (0, 2, 3))
    return [stage, replace(patches, mode="backward"), replace(wide, layout="channels_last")]


def swept(rehearsal: bool) -> list[Place]:
    """The launches that are timed with other plans."""
    if rehearsal:
        return [Place(timed_cases(True)[0], "forward"), Place(line_scan_cases(True)[0], "line_scan")]
    patches, large, stage, wide, _ = (Case("propagate", *shape) for shape in gpu_cases.LARGE)
    return [
        Place(patches, "forward"), Place(patches, "forward", 2), Place(large, "forward"), Place(stage, "forward"),
        Place(replace(wide, layout="channels_last"), "forward"), Place(line_scan_cases(False)[0], "line_scan"),
    ]  # fmt: skip


def tiny_cases() -> list[Case]:
    """Six calls for tools that slow everything down."""
    call = Case("propagate", 1, 8, 20)
    scan = Case("line_scan", 1, 4, 20, states=0, direction="left")
    return [
        call, replace(call, layout="channels_last", dtype="bf16"), replace(call, mode="backward"),
        replace(call, mode="backward", layout="channels_last", taps="shared"), scan,
        replace(scan, mode="backward", direction="up", taps="shared"),
    ]  # fmt: skip


def profiled() -> list[Place]:
    """The launches that are profiled."""
    patches, _, stage, wide, _ = (Case("propagate", *shape) for shape in gpu_cases.LARGE)
    return [
        Place(patches, "forward"), Place(patches, "forward", 2), Place(stage, "forward"),
        Place(replace(wide, layout="channels_last"), "forward"), Place(line_scan_cases(False)[0], "line_scan"),
        Place(replace(patches, mode="backward"), "gradients of taps"),
    ]  # fmt: skip


def operators(context: Context) -> list[tuple[PropagateSweep, int]]:
    """The calls of the operator as a whole, and the size of their maps."""
    if context.rehearsal:
        return [(PropagateSweep(device=context.device, channels=2, proxy_dim=1, mode="train"), 3)]
    one = PropagateSweep(device=context.device)
    return [
        (one, 64), (replace(one, mode="train"), 64), (one, 128), (replace(one, mode="train"), 128),
        (replace(one, batch=32, channels=1152), 74),
    ]  # fmt: skip


def operator_cases(context: Context) -> list[Case]:
    """The same as cases, each once."""
    return list(dict.fromkeys(case for bench, size in operators(context) for case in cases_of(bench, size)))


def launches_of_part(context: Context, part: int) -> Iterator[Launch]:
    """All launches of a part that can be known beforehand."""
    if part == 1:
        cases = [*line_scan_cases(False), *repeated_cases(False), *timed_cases(False)]
    else:
        cases = [*operator_cases(context), *(place.case for place in swept(False)), *tiny_cases()]
        yield from model_launches(context, MODEL, MODEL_SIZE, MODEL_BATCH)
    for case in cases:
        yield from case.call(context.card, context.limits)[0]
    if part == 2:
        for place in swept(False):
            yield from (launch for _, launch in choices(context, place))


def jobs_for(
    cases: Sequence[Any], run: Callable[..., None], name: Callable[[Any], str] = lambda case: case.name
) -> list[Job]:
    """A job for each case."""
    return [
        Job(name(one), lambda context, one=one: run(context, *(one if isinstance(one, tuple) else (one,))))
        for one in cases
    ]


def steps_of_part(context: Context, part: int, compiling: Job, tools: Sequence[Step]) -> list[Step]:
    """The steps of a part, in order. ``compiling`` and ``tools`` are those that start other programs."""
    small = context.rehearsal
    first = [Step("0 machine", 20, [Job("machine", machine)]), Step("1 compile", 60, [compiling])]
    if part == 1:
        scans = line_scan_cases(small)
        return [
            *first,
            Step("2 correctness", 80, jobs_for([*timed_cases(small), *scans], check)),
            Step("3 repetition", 30, jobs_for(repeated_cases(small), repeat)),
            Step("5 launches", 60, jobs_for(timed_cases(small), time_launches)),
            Step("6 line_scan", 30, jobs_for(scans, time_launches)),
        ]
    models = [(MODEL, MODEL_SIZE, MODEL_BATCH), ("swin_tiny_patch4_window7_224", MODEL_SIZE, MODEL_BATCH)]
    if small:
        models = [("test_efficientnet", 64, 2)]
    trained = [(*one, mode) for one in models for mode in ("inference", "train")]
    return [
        *first,
        Step("2 correctness", 15, jobs_for(operator_cases(context), check)),
        Step("7 sweeps", 45, jobs_for(swept(small), sweep)),
        Step(
            "9 operator",
            40,
            jobs_for(operators(context), operator, lambda one: f"{one[0].mode} {one[0].channels} {one[1]}"),
        ),
        Step("10 model", 35, jobs_for(trained, model, lambda one: f"{one[0]} {one[3]}")),
        *tools,
    ]


# --- Other programs ---------------------------------------------------------------------------------------------------


def compile_in_processes(context: Context, part: int) -> None:
    """Compile the kernels of a part by processes that never see the device: Triton keeps them on the disk."""
    if context.rehearsal:
        context.skip("kernels", "the interpreter compiles nothing")
        return
    path = context.table.path
    what = json.dumps([str(path), part, context.arch, asdict(context.card)])
    subprocess.run([sys.executable, __file__, "--compile", what], check=True, timeout=COMPILING + 30)


def compile_all(path: Path, part: int, arch: int, card: Card) -> None:
    """Compile the kernels of a part, and write the keys of those that are ready."""
    limits = Limits(card.shared_memory)
    context = Context(torch.device("cpu"), card, arch, limits, Table(path, part), step="1 compile")
    begin, done, slowest = time.monotonic(), [], 0.0
    launches = {gpu_counts.code_key(one, arch): one for one in launches_of_part(context, part)}
    jobs = {key: functools.partial(compile_one, one, arch) for key, one in launches.items()}
    for key, result in gpu_counts.in_processes(jobs, os.cpu_count() or 1, COMPILING):
        if isinstance(result, Exception):
            plan = " ".join(f"{name}={value}" for name, value in launches[key].plan.constants.items())
            context.attempt("", kind_of(launches[key]), functools.partial(_raise, result), plan=plan)
        else:
            done.append(key)
            slowest = max(slowest, result)
            context.keep_compiled(done)
        if time.monotonic() - begin > COMPILING:
            break
    note = f"{len(done)} of {len(jobs)} in {time.monotonic() - begin:.0f} s, the slowest in {slowest:.1f} s"
    context.attempt("", "kernels", lambda: {"note": note})


def _raise(error: Exception) -> Row:
    raise error


def compile_one(launch: Launch, arch: int) -> float:
    """Seconds that it took."""
    gpu_counts.pretend("cuda", arch, 32)
    begin = time.monotonic()
    launch.kernel.warmup(**launch.arguments(), grid=launch.plan.grid)
    return time.monotonic() - begin


def run_launches(names: Sequence[str]) -> None:
    """Run all launches of tiny calls, and single ones of others, for the tools that start this program."""
    device = torch.device("cuda")
    for case in (one for one in tiny_cases() if one.name in names):
        for launch in Call.of(case, device).launches():
            launch.run()
    for place in (one for one in profiled() if one.name in names):
        place.of(Call.of(place.case, device).launches()).run()
    torch.cuda.synchronize()


def find_tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit.

    Raises:
        NotHereError: it is not installed.
    """
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", *Path("/opt/nvidia").glob("nsight-compute/*")]
    found = shutil.which(name) or next((path for one in folders if (path := shutil.which(name, path=str(one)))), None)
    if found is None:
        raise NotHereError(f"{name} is not installed")
    return found


@dataclass
class Tool:
    """A tool that is running this program; its output goes to a file."""

    log: Path
    process: subprocess.Popen[bytes]
    end: float

    @classmethod
    def start(cls, log: Path, *command: str, names: Sequence[str], **environment: str) -> Tool:
        """Start ``command`` with the launches of ``names``."""
        whole = [find_tool(command[0]), *command[1:], sys.executable, __file__, "--run", *names]
        with log.open("w") as file:
            process = subprocess.Popen(
                whole, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
            )
        return cls(log, process, time.monotonic() + TOOL_SECONDS)

    def lines(self) -> list[str]:
        """The output, when the tool is done. It is ended when its time is over."""
        try:
            self.process.wait(max(self.end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # with the program that it runs
            self.process.wait()
            raise RuntimeError(f"not done after {TOOL_SECONDS} s") from None
        return self.log.read_text(errors="replace").splitlines() or [""]


def sanitize(context: Context) -> None:
    """Run six tiny calls under three tools at once, without the allocator that hides what lies beside a tensor."""
    names = [case.name for case in tiny_cases()]

    def finish(tool: Tool) -> Row:
        lines = tool.lines()
        summary = next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1]).strip("= ")
        if tool.process.returncode == 9:
            raise WrongResultError(summary)
        if tool.process.returncode:
            raise RuntimeError(summary)
        return {"note": summary}

    def start(kind: str) -> Tool:
        log, command = context.table.path.with_name(f"{kind}.log"), ("compute-sanitizer", "--tool", kind)
        return Tool.start(log, *command, "--error-exitcode", "9", names=names, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    try:
        tools = {kind: start(kind) for kind in ("memcheck", "racecheck", "initcheck")}
    except NotHereError as error:
        context.skip("compute-sanitizer", str(error))
        return
    for kind, tool in tools.items():
        context.attempt("six tiny calls", kind, functools.partial(finish, tool))


METRICS = {
    "gpu__time_duration.sum": "time", "launch__registers_per_thread": "registers",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "smsp__inst_executed.sum": "instructions",
}  # fmt: skip
"""The metrics that ncu is asked for, and their names in the row."""


def profile(context: Context) -> None:
    """Profile a launch of six calls by ncu; its output is in ``ncu.csv``."""
    places = profiled()
    kernels = {one.of(one.case.call(context.card, context.limits)[0]).kernel.__name__ for one in places}
    options = ("--csv", "--page", "raw", "--metrics", ",".join(METRICS))
    options += ("--kernel-name", f"regex:^({'|'.join(sorted(kernels))})$")

    def run() -> Row:
        log = context.table.path.with_name("ncu.csv")
        lines = Tool.start(log, "ncu", *options, names=[one.name for one in places]).lines()
        table = [line for line in lines if line.startswith('"')]
        if len(table) < 3:
            raise RuntimeError(next((line for line in lines if "ERR" in line.upper()), lines[-1]))
        units, *rows = csv.DictReader(io.StringIO("\n".join(table)))
        for place, row in zip(places, rows, strict=False):
            note = ", ".join(f"{label} {row[metric]} {units[metric]}".strip() for metric, label in METRICS.items())
            context.attempt(place.name, row["Kernel Name"], lambda note=note: {"note": note})
        return {"note": f"{len(rows)} launches"}

    context.attempt("", "ncu", run)


# --- The program ------------------------------------------------------------------------------------------------------


def card_of(device: torch.device) -> tuple[Card, int]:
    """The card and its compute capability; for the interpreter an H100."""
    if device.type != "cuda":
        return CARDS[90], 90
    here = torch.cuda.get_device_properties(device)
    arch = here.major * 10 + here.minor
    like = CARDS[max((one for one in CARDS if one <= arch), default=min(CARDS))]
    clock = getattr(here, "clock_rate", 0) / 1e6 or like.clock
    memory = limits_of(device).shared_memory
    return replace(
        like, name=here.name, multiprocessors=here.multi_processor_count, clock=clock, shared_memory=memory
    ), arch  # fmt: skip


def work(part: int, folder: Path, rehearsal: bool) -> None:
    """Run the jobs of a part that are left."""
    device = torch.device("cpu" if rehearsal else "cuda")
    (folder / "environment.json").write_text(json.dumps(asdict(describe(device))))
    card, arch = card_of(device)
    context = Context(device, card, arch, limits_of(device), Table(folder / f"part{part}.csv", part), rehearsal)
    compiling = Job("compile", lambda context: compile_in_processes(context, part))
    tools = [
        Step("4 sanitizer", TOOL_SECONDS + 10, [Job("sanitize", sanitize)]),
        Step("8 profile", TOOL_SECONDS + 10, [Job("profile", profile)]),
    ]
    run_steps(context, steps_of_part(context, part, compiling, tools))


def main() -> int:
    """Run both parts, or one, each by a process that is started again where it ends too early."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2), help="one part alone")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--rehearsal", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    for name in ("--worker", "--compile", "--run"):  # how the program starts itself
        parser.add_argument(name, nargs="+" if name == "--run" else None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        path, part, arch, card = json.loads(options.compile)
        compile_all(Path(path), part, arch, Card(**card))
        return 0
    if options.run:
        run_launches(options.run)
        return 0
    if options.rehearsal != interpreted():
        parser.error("--rehearsal needs TRITON_INTERPRET=1 set, and nothing else does")
    if options.worker:
        work(int(options.worker), options.output, options.rehearsal)
        return 0
    if not options.rehearsal and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; TRITON_INTERPRET=1 and --rehearsal try the program without one")
    options.output.mkdir(parents=True, exist_ok=True)
    bad = False
    for part in (1, 2) if options.part is None else (options.part,):
        for old in options.output.glob(f"part{part}.*"):
            old.unlink()
        path = options.output / f"part{part}.csv"
        command = [sys.executable, __file__, "--worker", str(part), "--output", str(options.output)]
        limits = REHEARSAL_LIMITS if options.rehearsal else LIMITS
        left = supervise(command + ["--rehearsal"] * options.rehearsal, path, *limits)
        table = Table(path, part)
        if left:
            table.add(
                {"step": "end", "what": "jobs are left", "status": SKIPPED if "over" in left else ERROR, "note": left}
            )
        print(f"part {part}: {dict(Counter(row['status'] for row in table.rows))}; {write_page(options.output)}")
        bad |= any(row["status"] in (FAIL, ERROR) for row in table.rows)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
