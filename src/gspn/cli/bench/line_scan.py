"""``gspn bench line-scan``: the operator beside its baselines and this machine's copy bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

import gspn
from gspn._console import Console
from gspn._errors import UsageError
from gspn.ops.implementations import IMPLEMENTATIONS

from ..messages import failed, titled_table
from ..options import parse_size
from .common import Layout, Run, Segment, bench_command, choice, count, hardware, layout, progress_bar, write_files

if TYPE_CHECKING:
    import torch

    from gspn.bench.accuracy_check import Accuracy
    from gspn.bench.line_scan import Problem
    from gspn.bench.report import Result


@bench_command(batch=16, repeats=10, min_time=0.5)
def bench_line_scan(
    run: Run,
    channels: Annotated[int, count("Number of channels.")] = 8,
    groups: Annotated[
        int | None, count("Sets of taps; a divisor of the channels. Default: the channels, per-channel taps.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the map in pixels, or one number for a square. Default: 512 on a CPU, 1024 on CUDA.",
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        choice("--mode", "MODE", ("forward", "backward"), "What to time. Repeatable; default: both."),
    ] = None,
    direction: Annotated[
        list[str] | None,
        choice("--direction", "DIRECTION", gspn.DIRECTIONS, "Direction of the scan. Repeatable; default: all four."),
    ] = None,
    impl: Annotated[
        list[str] | None,
        choice("--impl", "IMPL", list(IMPLEMENTATIONS), "Implementation. Repeatable; default: all that run here."),
    ] = None,
    segment: Segment = None,
    memory_format: Layout = "contiguous",
    no_baselines: Annotated[
        bool,
        typer.Option("--no-baselines", help="Leave out slow baselines: the loop and, on CUDA, one launch a line."),
    ] = False,
    fresh_pages: Annotated[
        bool,
        typer.Option(
            "--fresh-pages",
            help="On a CPU, let each call pay for page faults in its outputs, as with glibc's allocator by default.",
        ),
    ] = False,
) -> None:
    """Time line_scan beside a copy of as many bytes and beside the specification's loop.

    Each implementation is first compared with the float64 specification on a smaller problem of the same kind. Where
    an error is more than twice that of plain PyTorch, nothing is timed and the exit code is 1.

    All candidates take turns within one run; for slow baselines three samples are enough. Backward is the operator for
    all three gradients, alone.
    """
    from gspn.bench import environment, line_scan
    from gspn.bench.report import plot_fractions
    from gspn.bench.timing import freed_pages_kept

    fixed = run.problem()
    where = fixed["device"]
    width, height = parse_size(size or ("1024" if where.type == "cuda" else "512"))
    groups = channels if groups is None else groups
    if channels % groups:
        raise UsageError(
            f"--groups {groups} does not divide --channels {channels}; use 1 (shared taps), {channels} (per-channel "
            "taps) or a divisor between."
        )
    impls = _impls(impl, where, fixed["dtype"])
    problems = [
        line_scan.Problem(
            channels=channels, groups=groups, height=height, width=width, direction=one,  # type: ignore[arg-type]
            segment=segment, memory_format=layout(memory_format), **fixed,
        )
        for one in direction or gspn.DIRECTIONS
    ]  # fmt: skip
    modes = mode or list(line_scan.MODES)
    _check_memory(problems[0])

    keep = where.type == "cpu" and not fresh_pages
    with (
        # Twice what a backward call returns.
        freed_pages_kept(problems[0].traffic("backward")) if keep else nullcontext(False) as kept,
        progress_bar() as progress,
    ):
        _check_all(problems, impls, modes, not no_baselines, progress)
        task = progress.add_task("timing", total=None)
        results = line_scan.measure(
            problems[0], [problem.direction for problem in problems], impls, modes, baselines=not no_baselines,
            pages="kept" if kept else "system", repeats=run.repeats, min_time=run.min_time,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip

    here = environment.describe(where)
    restarts = "global" if segment is None else f"segment {segment}"
    title = f"B{run.batch} C{channels} G{groups} {width}x{height} {run.dtype}, {memory_format}, {restarts}"
    Console().print(_table(results, f"line_scan {title}\n{hardware(here)}"))
    heading, subtitle = "line_scan, fraction of copy bandwidth", f"{hardware(here)}   ·   {title}"
    write_files(run, results, here, lambda: plot_fractions(results, heading, subtitle), line_scan.COLUMNS)


def _impls(requested: list[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    import torch

    from gspn.bench.line_scan import LOOP

    reasons = gspn.available_impls(torch.empty(0, device=device, dtype=dtype), op="line_scan")
    for name in requested or []:
        if reasons[name] is not None:
            raise UsageError(f"--impl {name!r} cannot run here: {reasons[name]}")
    # The reference comes as a baseline, unless it is asked for by name.
    return requested or [name for name, reason in reasons.items() if reason is None and name != LOOP]


def _check_memory(problem: Problem) -> None:
    from gspn.bench import environment

    free = environment.free_memory(problem.device)
    # The inputs and outputs of one backward call, and the copy's buffers.
    needed = problem.traffic("backward") + problem.traffic("forward")
    if free is not None and needed > free:
        raise failed(
            f"this problem needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on "
            f"{problem.device}. Use a smaller --batch or --size."
        )


def _check_all(
    problems: Sequence[Problem], impls: Sequence[str], modes: Sequence[str], baselines: bool, progress: Progress
) -> None:
    from gspn.bench import line_scan
    from gspn.bench.accuracy_check import require_accurate

    task = progress.add_task("checking", total=len(problems))
    checked: dict[str, list[Accuracy]] = {}
    for problem in problems:
        names, small = list(impls), problem.reduced()
        if baselines and "forward" in modes and line_scan.why_no_line_per_launch(problem) is None:
            names.append(line_scan.LINE_PER_LAUNCH)
        case = f"{problem.direction} on B{small.batch} C{small.channels} G{small.groups} {small.width}x{small.height}"
        for name, accuracies in line_scan.check(problem, names, modes).items():
            checked[f"{name} {case}"] = accuracies
        progress.advance(task)
    require_accurate(checked)


def _table(results: Sequence[Result], title: str) -> Table:
    from gspn.bench.line_scan import LINE_PER_LAUNCH, LOOP
    from gspn.bench.report import plain_number

    table = titled_table(title, ["impl", "direction", "mode"], ["ms p50", "GB/s", "of copy", "over loop"])
    previous = None
    for r in results:
        case, details = (r.mode, r.details["direction"]), r.details
        if previous not in (None, case):
            table.add_section()
        previous = case
        table.add_row(
            r.name,
            str(details["direction"]),
            r.mode,
            "" if r.timing is None else plain_number(r.timing.p50),
            plain_number(float(details["gbs"] or 0)),
            f"{details['fraction_of_copy']:.1%}",
            "" if r.ratio is None else f"{r.ratio:.1f}x",
            style="dim" if r.name in (LOOP, LINE_PER_LAUNCH) else None,
        )
    first = results[0].details
    speed = plain_number(float(first["copy_gbs"] or 0))
    table.caption = f"copy in the same run: {speed} GB/s read plus written ({first['copy']})"
    return table
