"""``gspn bench line-scan``: the operator beside its baselines and this machine's copy bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gspn
from gspn.bench import environment, line_scan, report
from gspn.bench.accuracy_check import Figure
from gspn.bench.timing import freed_pages_kept
from gspn.ops.implementations import IMPLEMENTATIONS

from .options import (
    DTYPES,
    MEMORY_FORMATS,
    Csv,
    Device,
    MinTime,
    Png,
    Threads,
    check_plot,
    choice,
    count,
    device_named,
    failed,
    hardware,
    progress_bar,
    wrote,
)


def bench_line_scan(
    batch: Annotated[int, count("B.")] = 16,
    channels: Annotated[int, count("C.")] = 8,
    groups: Annotated[int | None, count("G, sets of taps; divides the channels. Default: C, per-channel taps.")] = None,
    height: Annotated[int | None, count("H. Default: 512 on a CPU, 1024 on a CUDA device.")] = None,
    width: Annotated[int | None, count("W. Default: likewise.")] = None,
    dtype: Annotated[str, choice("--dtype", "DTYPE", list(DTYPES), "Of every tensor.")] = "float32",
    mode: Annotated[list[str] | None, choice("--mode", "MODE", line_scan.MODES, "Repeatable; default: both.")] = None,
    direction: Annotated[
        list[str] | None, choice("--direction", "DIRECTION", gspn.DIRECTIONS, "Repeatable; default: all four.")
    ] = None,
    impl: Annotated[
        list[str] | None,
        choice("--impl", "IMPL", list(IMPLEMENTATIONS), "Repeatable; default: all that run here."),
    ] = None,
    device: Device = None,
    segment: Annotated[int | None, count("Lines after which the scan restarts. Default: never.")] = None,
    memory_format: Annotated[
        str, choice("--memory-format", "LAYOUT", list(MEMORY_FORMATS), "Of every tensor.")
    ] = "contiguous",
    threads: Threads = None,
    repeats: Annotated[int, count("Fewest samples of each candidate; slow baselines take 3.")] = 10,
    min_time: MinTime = 0.5,
    no_baselines: Annotated[
        bool,
        typer.Option("--no-baselines", help="Leave out the slow ones: the loop and, on CUDA, one launch a line."),
    ] = False,
    fresh_pages: Annotated[
        bool,
        typer.Option(
            "--fresh-pages",
            help="On a CPU, let each call fault its outputs' memory in anew, as glibc's allocator does by default.",
        ),
    ] = False,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time line_scan beside a copy of as many bytes and beside the specification's loop.

    Each implementation is first held against the float64 specification on a smaller problem of the same kind.
    Where an error is more than twice that of plain PyTorch, nothing is timed and the exit code is 1.

    All candidates take turns within one run. Backward is the operator for all three gradients, alone.
    """
    where = device_named(device)
    side = 1024 if where.type == "cuda" else 512
    groups = channels if groups is None else groups
    if channels % groups:
        raise typer.BadParameter(
            f"{groups} does not divide --channels {channels}; use 1 (shared taps), {channels} (per-channel taps) "
            "or a divisor between.",
            param_hint="--groups",
        )
    impls = _impls(impl, where, DTYPES[dtype])
    if plot is not None:
        check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    problems = [
        line_scan.Problem(
            batch=batch,
            channels=channels,
            groups=groups,
            height=height or side,
            width=width or side,
            dtype=DTYPES[dtype],
            direction=one,  # type: ignore[arg-type]
            segment=segment,
            memory_format=MEMORY_FORMATS[memory_format],
            device=where,
        )
        for one in direction or gspn.DIRECTIONS
    ]
    modes = mode or list(line_scan.MODES)
    baselines = not no_baselines
    console = Console()
    _check_memory(problems[0])

    keep = where.type == "cpu" and not fresh_pages
    with (
        # Twice what a backward call returns.
        freed_pages_kept(problems[0].traffic("backward")) if keep else nullcontext(False) as kept,
        progress_bar() as progress,
    ):
        try:
            _check_all(problems, impls, modes, baselines, progress)
            task = progress.add_task("timing", total=None)
            measurements = line_scan.measure(
                problems[0],
                [problem.direction for problem in problems],
                impls,
                modes,
                baselines=baselines,
                repeats=repeats,
                min_time=min_time,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except torch.OutOfMemoryError as error:
            progress.stop()
            raise failed(f"out of memory on {where}: {error}\nUse a smaller --batch, --height or --width.") from None

    here = environment.describe(where)
    title = _shape_line(problems[0], memory_format)
    console.print(_table(measurements, title, here))
    pages = "kept" if kept else "system"
    if output is not None:
        report.write_csv(output, measurements, here, pages=pages)
        wrote(console, output)
    if plot is not None:
        subtitle = f"{hardware(here)}   ·   {title}"
        figure = report.plot_fractions(measurements, "line_scan, fraction of copy bandwidth", subtitle)
        report.save_figure(figure, plot)
        wrote(console, plot)


# --- Options ----------------------------------------------------------------------------------------------------------


def _impls(asked: list[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = gspn.available_impls(torch.empty(0, device=device, dtype=dtype), op="line_scan")
    for name in asked or []:
        if reasons[name] is not None:
            raise typer.BadParameter(f"{name!r} cannot run here: {reasons[name]}", param_hint="--impl")
    # The reference comes as a baseline, unless it is asked for by name.
    return asked or [name for name, reason in reasons.items() if reason is None and name != line_scan.LOOP]


def _check_memory(problem: line_scan.Problem) -> None:
    free = environment.free_memory(problem.device)
    # The inputs and outputs of one backward call, and the copy's buffers.
    needed = problem.traffic("backward") + problem.traffic("forward")
    if free is not None and needed > free:
        raise failed(
            f"this problem needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on "
            f"{problem.device}. Use a smaller --batch, --height or --width."
        )


# --- The check --------------------------------------------------------------------------------------------------------


def _check_all(
    problems: Sequence[line_scan.Problem],
    impls: Sequence[str],
    modes: Sequence[str],
    baselines: bool,
    progress: Progress,
) -> None:
    task = progress.add_task("checking", total=len(problems))
    red: list[tuple[line_scan.Problem, str, list[Figure]]] = []
    for problem in problems:
        names = list(impls)
        if baselines and "forward" in modes and line_scan.why_no_line_per_launch(problem) is None:
            names.append(line_scan.LINE_PER_LAUNCH)
        for name, figures in line_scan.check(problem, names, modes).items():
            if not all(figure.ok for figure in figures):
                red.append((problem, name, figures))
        progress.advance(task)
    if red:
        progress.stop()
        Console(stderr=True).print(_red_table(red))
        raise failed("the check failed, so nothing was timed.")


def _red_table(red: Sequence[tuple[line_scan.Problem, str, list[Figure]]]) -> Table:
    table = Table(title="Results differ from the specification", title_justify="left", title_style="bold red")
    for heading in ("impl", "direction", "checked shape", "result"):
        table.add_column(heading)
    for heading in ("error", "plain PyTorch's", "accepted"):
        table.add_column(heading, justify="right")
    for problem, name, figures in red:
        small = problem.reduced()
        shape = f"B{small.batch} C{small.channels} G{small.groups} {small.height}x{small.width}"
        for figure in figures:
            table.add_row(
                name,
                problem.direction,
                shape,
                figure.name,
                f"{figure.error:.3g}",
                f"{figure.plain_error:.3g}",
                f"{figure.bound:.3g}",
                style=None if figure.ok else "red",
            )
    return table


# --- The report -------------------------------------------------------------------------------------------------------


def _shape_line(problem: line_scan.Problem, memory_format: str) -> str:
    segment = "global" if problem.segment is None else f"segment {problem.segment}"
    return (
        f"B{problem.batch} C{problem.channels} G{problem.groups} {problem.height}x{problem.width} "
        f"{str(problem.dtype).removeprefix('torch.')}, {memory_format}, {segment}"
    )


def _table(measurements: Sequence[report.Measurement], title: str, here: environment.Environment) -> Table:
    table = Table(title=f"line_scan {title}\n{hardware(here)}", title_justify="left", title_style="bold")
    table.add_column("impl", no_wrap=True)
    table.add_column("direction")
    table.add_column("mode")
    for heading in ("ms p50", "GB/s", "of copy", "over loop"):
        table.add_column(heading, justify="right")
    previous = None
    for m in measurements:
        if previous is not None and previous != (m.mode, m.direction):
            table.add_section()
        previous = (m.mode, m.direction)
        speedup = m.speedup_over_loop
        table.add_row(
            m.impl,
            m.direction,
            m.mode,
            report.plain_number(m.timing.p50),
            report.plain_number(m.gbs),
            f"{m.fraction_of_copy:.1%}",
            "" if speedup is None else f"{speedup:.1f}x",
            style="dim" if m.impl in (line_scan.LOOP, line_scan.LINE_PER_LAUNCH) else None,
        )
    copy, copy_gbs = measurements[0].copy, measurements[0].copy_gbs
    table.caption = f"copy in the same run: {report.plain_number(copy_gbs)} GB/s read plus written ({copy})"
    table.caption_justify = "left"
    return table
