"""``gspn bench propagate``, ``block`` and ``scaling``: the operator beside its composition and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspn.bench import environment, report

from .options import (
    DTYPES,
    MEMORY_FORMATS,
    Csv,
    Device,
    MinTime,
    Png,
    Threads,
    at_least,
    check_plot,
    choice,
    count,
    device_named,
    each_at_least,
    failed,
    hardware,
    progress_bar,
    require_timm,
    wrote,
)

if TYPE_CHECKING:
    from gspn.bench.comparison import Result
    from gspn.bench.propagate import PropagateProblem

Channels = Annotated[int, count("Channels of the map.")]
Batch = Annotated[int, count("Maps at a time.")]
States = Annotated[int, count("Channels of the proxy.")]
Shared = Annotated[bool, typer.Option("--shared", help="One set of taps for all channels.")]
Segment = Annotated[int | None, typer.Option(metavar="LINES", help="Restart after so many lines; default: global.")]
Dtype = Annotated[str, choice("--dtype", "DTYPE", list(DTYPES), "Of every tensor.")]
Mode = Annotated[
    str, choice("--mode", "MODE", ("forward", "train"), "Forward alone, or forward and backward to every argument.")
]
Side = Annotated[
    list[int] | None, typer.Option(metavar="N", callback=each_at_least(1), help="H = W of a map. Repeatable.")
]
Slowest = Annotated[
    float, typer.Option(metavar="SECONDS", callback=at_least(0), help="A candidate ends before a call takes longer.")
]
Format = Annotated[str, choice("--memory-format", "FORMAT", list(MEMORY_FORMATS), "Of the maps.")]


def bench_propagate(
    channels: Channels = 640,
    batch: Batch = 1,
    states: States = 8,
    shared: Shared = False,
    segment: Segment = None,
    side: Side = None,
    dtype: Dtype = "float32",
    mode: Mode = "forward",
    memory_format: Format = "contiguous",
    impl: Annotated[str, typer.Option(help="Of propagate.")] = "auto",
    slowest: Slowest = 20.0,
    device: Device = None,
    threads: Threads = None,
    repeats: Annotated[int, count("Fewest samples of each candidate at each size.")] = 5,
    min_time: MinTime = 0.3,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time gspn.propagate, the same with every map in memory, softmax attention and linear attention.

    The composition runs line_scan's fastest implementation. Attention takes its queries, keys and values ready, in
    heads of 64; the backend that PyTorch chose is named. The operator is first held against its float64 specification,
    and nothing is timed where an error is more than twice that of plain PyTorch.
    """
    problem = _problem(
        channels, batch, states, shared, segment, dtype, mode, memory_format, device, threads, impl, plot
    )
    from gspn.bench import propagate as bench

    _check(problem)
    results = _with_bar(
        lambda progress: bench.measure_propagate(
            problem, sides=side or (64, 128), slowest_ms=slowest * 1e3, repeats=repeats, min_time=min_time,
            progress=progress,
        ),
        problem,
    )  # fmt: skip
    rate = bench.matmul_rate(problem.device, problem.dtype)
    notes = [f"matrix product of 1024: {rate / 1e9:.0f} GFLOP/s"]
    for r in results:
        if r.name == bench.PROPAGATE and r.timing is not None and mode == "forward":
            elements = batch * channels * r.height * r.width
            done = bench.operations(channels, states, problem.groups) * elements / (r.timing.p50 / 1e3)
            notes.append(f"propagate at {r.height}: {done / 1e9:.0f} GFLOP/s, {done / rate:.0%} of it")
    _report("propagate", problem, results, notes, output, plot, "gspn.propagate beside attention")


def bench_block(
    channels: Channels = 640,
    batch: Batch = 1,
    states: States = 8,
    side: Side = None,
    dtype: Dtype = "float32",
    mode: Mode = "forward",
    slowest: Slowest = 20.0,
    device: Device = None,
    threads: Threads = None,
    repeats: Annotated[int, count("Fewest samples of each candidate at each size.")] = 5,
    min_time: MinTime = 0.3,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time whole sub-layers with their projections: GSPN (in, proxy, out), softmax and linear attention (qkv, out).

    Maps are channels_last, in which neither kind copies them.
    """
    problem = _problem(
        channels, batch, states, False, None, dtype, mode, "channels_last", device, threads, "auto", plot
    )
    from gspn.bench import propagate as bench

    _check(problem)
    results = _with_bar(
        lambda progress: bench.measure_blocks(
            problem, sides=side or (16, 32, 64, 128), slowest_ms=slowest * 1e3, repeats=repeats, min_time=min_time,
            progress=progress,
        ),
        problem,
    )  # fmt: skip
    _report("sub-layers", problem, results, [], output, plot, "A sub-layer on growing maps")


def bench_scaling(
    channels: Channels = 32,
    batch: Batch = 1,
    states: States = 8,
    shared: Shared = False,
    segment: Segment = None,
    side: Side = None,
    attention: Annotated[bool, typer.Option(help="Softmax attention beside it.")] = False,
    dtype: Dtype = "float32",
    mode: Mode = "forward",
    memory_format: Format = "channels_last",
    slowest: Slowest = 60.0,
    device: Device = None,
    threads: Threads = None,
    repeats: Annotated[int, count("Fewest samples at each size.")] = 5,
    min_time: MinTime = 0.3,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time gspn.propagate on maps from 128 to 2048 and fit p in time ~ pixels^p over all of them.

    A size for which the maps would not fit into free memory is left out, and said.
    """
    problem = _problem(
        channels, batch, states, shared, segment, dtype, mode, memory_format, device, threads, "auto", plot
    )
    from gspn.bench import propagate as bench

    _check(problem)
    sides = side or [128, 256, 512, 1024, 2048]
    free = environment.free_memory(problem.device)
    # x, y and as much again while they are made; with gradients of all of them and the copies that autograd keeps.
    needed = {n: n * n * batch * channels * problem.dtype.itemsize * (4 if mode == "forward" else 8) for n in sides}
    fitting = [n for n in sides if free is None or needed[n] < free]
    notes = [f"{n} x {n} left out: {needed[n] / 1e9:.1f} GB" for n in sides if n not in fitting]
    if not fitting:
        raise failed(f"no size fits: {', '.join(notes)}. Use a smaller --side or --channels.")
    names = (bench.PROPAGATE, bench.SOFTMAX) if attention else (bench.PROPAGATE,)
    results = _with_bar(
        lambda progress: bench.measure_propagate(
            problem, names, fitting, slowest_ms=slowest * 1e3, repeats=repeats, min_time=min_time, progress=progress
        ),
        problem,
    )
    _report("scaling", problem, results, notes, output, plot, "Time on growing maps", fit_all=True)


def _problem(
    channels: int, batch: int, states: int, shared: bool, segment: int | None, dtype: str, mode: str,
    memory_format: str, device: str | None, threads: int | None, impl: str, plot: Path | None,
) -> PropagateProblem:  # fmt: skip
    require_timm()
    from gspn.bench.propagate import PropagateProblem

    where = device_named(device)
    if plot is not None:
        check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    return PropagateProblem(
        channels=channels, batch=batch, states=states, shared=shared, segment=segment, dtype=DTYPES[dtype],
        device=where, mode=mode, memory_format=MEMORY_FORMATS[memory_format], impl=impl,
    )  # fmt: skip


def _check(problem: PropagateProblem) -> None:
    from gspn.bench.propagate import check_propagate

    red = [f for f in check_propagate(problem) if not f.ok]
    if red:
        off = "; ".join(f"{f.name} is off by {f.error:.3g}, and {f.bound:.3g} is accepted" for f in red)
        raise failed(f"the check failed, so nothing was timed: {off}")


def _with_bar(measure: Callable[[Callable[[int, int], None]], list[Result]], problem: PropagateProblem) -> list[Result]:
    with progress_bar() as bar:
        task = bar.add_task("timing", total=None)
        try:
            return measure(lambda done, total: bar.update(task, completed=done, total=total))
        except torch.OutOfMemoryError as error:
            bar.stop()
            message = f"out of memory on {problem.device}: {error}\nUse a smaller --batch, --channels or --side."
            raise failed(message) from None


def _report(
    what: str, problem: PropagateProblem, results: Sequence[Result], notes: Sequence[str], output: Path | None,
    plot: Path | None, title: str, *, fit_all: bool = False,
) -> None:  # fmt: skip
    from gspn.bench.comparison import write_results
    from gspn.bench.size_sweep import FITTED, exponents

    here = environment.describe(problem.device)
    console = Console()
    taps = "shared taps" if problem.shared else "per-channel taps"
    dtype = str(problem.dtype).removeprefix("torch.")
    shape = f"B{problem.batch} C{problem.channels} S{problem.states} {dtype}, {taps}"
    grown = exponents(results, None if fit_all else FITTED)
    console.print(_table(results, grown, notes, problem, f"{what}, {problem.mode}, {shape}\n{hardware(here)}"))
    if output is not None:
        write_results(output, results, here)
        wrote(console, output)
    if plot is not None:
        from gspn.bench.comparison_plot import plot_mixers

        report.save_figure(plot_mixers(results, grown, title, f"{hardware(here)}   ·   {problem.mode}, {shape}"), plot)
        wrote(console, plot)


def _table(
    results: Sequence[Result], grown: Mapping[str, float], notes: Sequence[str], problem: PropagateProblem, title: str
) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("map", no_wrap=True)
    table.add_column("candidate", no_wrap=True)
    for heading in ("ms p50", "ratio", "peak MB", "of x"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if r.timing is None:
            continue
        if previous is not None and r.height != previous:
            table.add_section()
        size = "" if r.height == previous else f"{r.height} x {r.width}"
        previous = r.height
        x_bytes = r.batch * problem.channels * r.height * r.width * problem.dtype.itemsize
        table.add_row(
            size,
            r.name,
            report.plain_number(r.timing.p50),
            "" if r.ratio is None else f"{1 / r.ratio:.2f}",
            "" if r.peak_bytes is None else report.plain_number(r.peak_bytes / 1e6),
            "" if r.peak_bytes is None else f"{r.peak_bytes / x_bytes:.2f}",
        )
    backends = dict.fromkeys(r.attention for r in results if r.attention not in ("", "none"))
    first = next((r.name for r in results), "")
    lines = [
        f"ratio: a candidate's time over that of {first} in the same run",
        "peak: of a call beyond its arguments, the result included",
    ]
    if backends:
        lines.append(f"attention backend: {', '.join(backends)}")
    if grown:
        lines.append("time ~ pixels^p: " + ", ".join(f"{n} {p:.2f}" for n, p in grown.items()))
    lines += [f"{r.name} ends before {r.height} x {r.width}: {r.skipped}" for r in results if r.skipped]
    table.caption = escape("\n".join([*lines, *notes]))
    table.caption_justify = "left"
    return table
