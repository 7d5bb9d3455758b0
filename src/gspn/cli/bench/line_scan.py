"""``gspn bench line-scan``: the operator beside its baselines and this machine's copy bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gspn
from gspn.ops.implementations import IMPLEMENTATIONS

from ..messages import failed
from ..options import parse_size
from .common import (
    Csv,
    Device,
    Dtype,
    Layout,
    MinTime,
    Png,
    Threads,
    bench_errors,
    choice,
    count,
    hardware,
    layout,
    prepare,
    progress_bar,
    report,
)

if TYPE_CHECKING:
    import torch

    from gspn.bench.accuracy_check import Accuracy
    from gspn.bench.line_scan import Problem
    from gspn.bench.report import Result


def bench_line_scan(
    batch: Annotated[int, count("Batch size.")] = 16,
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
    dtype: Dtype = "float32",
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
    device: Device = None,
    segment: Annotated[int | None, count("Number of lines after which the scan restarts. Default: never.")] = None,
    memory_format: Layout = "contiguous",
    threads: Threads = None,
    repeats: Annotated[int, count("Fewest samples of each candidate; slow baselines take 3.")] = 10,
    min_time: MinTime = 0.5,
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
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time line_scan beside a copy of as many bytes and beside the specification's loop.

    Each implementation is first compared with the float64 specification on a smaller problem of the same kind. Where
    an error is more than twice that of plain PyTorch, nothing is timed and the exit code is 1.

    All candidates take turns within one run. Backward is the operator for all three gradients, alone.
    """
    with bench_errors():
        import torch

        from gspn.bench import environment, line_scan
        from gspn.bench.report import plot_fractions
        from gspn.bench.timing import freed_pages_kept

        where = prepare(device, threads, plot)
        width, height = parse_size(size or ("1024" if where.type == "cuda" else "512"))
        groups = channels if groups is None else groups
        if channels % groups:
            raise typer.BadParameter(
                f"{groups} does not divide --channels {channels}; use 1 (shared taps), {channels} (per-channel taps) "
                "or a divisor between.",
                param_hint="--groups",
            )
        impls = _impls(impl, where, getattr(torch, dtype))
        problems = [
            line_scan.Problem(
                batch=batch,
                channels=channels,
                groups=groups,
                height=height,
                width=width,
                dtype=getattr(torch, dtype),
                direction=one,  # type: ignore[arg-type]
                segment=segment,
                memory_format=layout(memory_format),
                device=where,
            )
            for one in direction or gspn.DIRECTIONS
        ]
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
                problems[0],
                [problem.direction for problem in problems],
                impls,
                modes,
                baselines=not no_baselines,
                pages="kept" if kept else "system",
                repeats=repeats,
                min_time=min_time,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )

        here = environment.describe(where)
        restarts = "global" if segment is None else f"segment {segment}"
        title = f"B{batch} C{channels} G{groups} {width}x{height} {dtype}, {memory_format}, {restarts}"
        Console().print(_table(results, f"line_scan {title}\n{hardware(here)}"))
        heading, subtitle = "line_scan, fraction of copy bandwidth", f"{hardware(here)}   ·   {title}"
        report(results, here, output, plot, lambda: plot_fractions(results, heading, subtitle), line_scan.COLUMNS)


def _impls(requested: list[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    import torch

    from gspn.bench.line_scan import LOOP

    reasons = gspn.available_impls(torch.empty(0, device=device, dtype=dtype), op="line_scan")
    for name in requested or []:
        if reasons[name] is not None:
            raise typer.BadParameter(f"{name!r} cannot run here: {reasons[name]}", param_hint="--impl")
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

    task = progress.add_task("checking", total=len(problems))
    wrong: list[tuple[Problem, str, list[Accuracy]]] = []
    for problem in problems:
        names = list(impls)
        if baselines and "forward" in modes and line_scan.why_no_line_per_launch(problem) is None:
            names.append(line_scan.LINE_PER_LAUNCH)
        for name, accuracies in line_scan.check(problem, names, modes).items():
            if not all(one.ok for one in accuracies):
                wrong.append((problem, name, accuracies))
        progress.advance(task)
    if wrong:
        progress.stop()
        Console(stderr=True).print(_wrong_table(wrong))
        raise failed("the check failed, so nothing was timed.")


def _wrong_table(wrong: Sequence[tuple[Problem, str, list[Accuracy]]]) -> Table:
    table = Table(title="Results differ from the specification", title_justify="left", title_style="bold red")
    for heading in ("impl", "direction", "checked shape", "result"):
        table.add_column(heading)
    for heading in ("error", "plain PyTorch's", "accepted"):
        table.add_column(heading, justify="right")
    for problem, name, accuracies in wrong:
        small = problem.reduced()
        shape = f"B{small.batch} C{small.channels} G{small.groups} {small.width}x{small.height}"
        for one in accuracies:
            numbers = [f"{number:.3g}" for number in (one.error, one.plain_error, one.bound)]
            table.add_row(name, problem.direction, shape, one.name, *numbers, style=None if one.ok else "red")
    return table


def _table(results: Sequence[Result], title: str) -> Table:
    from gspn.bench.line_scan import LINE_PER_LAUNCH, LOOP
    from gspn.bench.report import plain_number

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("impl", no_wrap=True)
    table.add_column("direction")
    table.add_column("mode")
    for heading in ("ms p50", "GB/s", "of copy", "over loop"):
        table.add_column(heading, justify="right")
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
    table.caption_justify = "left"
    return table
