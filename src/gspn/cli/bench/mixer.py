"""``gspn bench mixer``: GSPN's token mixer beside self-attention on growing maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspn.bench import environment, report

from .options import (
    DTYPES,
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
    red_figures,
    require_timm,
    wrote,
)

if TYPE_CHECKING:
    from gspn.bench.comparison import Result

_MODES = ("forward", "train")


def bench_mixer(
    dim: Annotated[int, count("Channels of the map.")] = 96,
    batch: Annotated[int, count("Maps at a time.")] = 1,
    dtype: Annotated[str, choice("--dtype", "DTYPE", list(DTYPES), "Of weights and maps.")] = "float32",
    mode: Annotated[
        str, choice("--mode", "MODE", _MODES, "Forward alone, or forward and backward to input and weights.")
    ] = "forward",
    side: Annotated[
        list[int] | None,
        typer.Option(metavar="N", callback=each_at_least(1), help="H = W of a map. Repeatable; default: 16 to 512."),
    ] = None,
    slowest: Annotated[
        float,
        typer.Option(metavar="SECONDS", callback=at_least(0), help="A candidate ends before a call takes longer."),
    ] = 1.0,
    device: Device = None,
    threads: Threads = None,
    repeats: Annotated[int, count("Fewest samples of each candidate at each size.")] = 5,
    min_time: MinTime = 0.1,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time GSPNMixer and softmax self-attention of the same width on growing maps.

    Attention is qkv, scaled_dot_product_attention with heads of 32, and a projection: timm's, with the backend that
    PyTorch chooses. GSPN has taps for each channel (proxy of 8), or taps shared by all channels (proxy of 2).

    Each is first held against its float64 specification; where an error is more than twice that of the specification
    in the same dtype, nothing is timed and the exit code is 1.
    """
    require_timm()
    from gspn.bench import mixer

    where = device_named(device)
    if plot is not None:
        check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    problem = mixer.MixerProblem(dim=dim, batch=batch, dtype=DTYPES[dtype], device=where, mode=mode)
    red = {name: figures for name, figures in mixer.check_mixers(problem).items() if not all(f.ok for f in figures)}
    if red:
        raise failed(f"the check failed, so nothing was timed: {red_figures(red)}")
    with progress_bar() as bar:
        task = bar.add_task("timing", total=None)
        try:
            results = mixer.measure_mixers(
                problem,
                sides=side or mixer.SIDES,
                slowest_ms=slowest * 1e3,
                repeats=repeats,
                min_time=min_time,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except torch.OutOfMemoryError as error:
            bar.stop()
            raise failed(f"out of memory on {where}: {error}\nUse a smaller --batch, --dim or --side.") from None

    here = environment.describe(where)
    console = Console()
    grown = mixer.exponents(results)
    title = f"token mixers, {mode}, B{batch} C{dim} {dtype}"
    console.print(_table(results, grown, f"{title}\n{hardware(here)}"))
    if output is not None:
        from gspn.bench.comparison import write_results

        write_results(output, results, here)
        wrote(console, output)
    if plot is not None:
        from gspn.bench.comparison_plot import plot_mixers

        figure = plot_mixers(
            results, grown, "A token mixer on growing maps", f"{hardware(here)}   ·   {mode}, B{batch} C{dim} {dtype}"
        )
        report.save_figure(figure, plot)
        wrote(console, plot)


def _table(results: Sequence[Result], grown: Mapping[str, float], title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("map", no_wrap=True)
    table.add_column("mixer", no_wrap=True)
    for heading in ("ms p50", "over attention", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if r.timing is None:
            continue
        if previous is not None and r.height != previous:
            table.add_section()
        size = "" if r.height == previous else f"{r.height} x {r.width}"
        previous = r.height
        table.add_row(
            size,
            r.name,
            report.plain_number(r.timing.p50),
            "" if r.ratio is None else f"{r.ratio:.2f}x",
            "" if r.peak_bytes is None else report.plain_number(r.peak_bytes / 1e6),
        )
    backends = dict.fromkeys(r.attention for r in results if r.attention not in ("", "none"))
    lines = [f"attention backend: {', '.join(backends) or 'not run'}"]
    if grown:
        lines.append("time ~ pixels^p, p on the largest maps: " + ", ".join(f"{n} {p:.2f}" for n, p in grown.items()))
    lines += [f"{r.name} ends before {r.height} x {r.width}: {r.skipped}" for r in results if r.skipped]
    table.caption = escape("\n".join(lines))
    table.caption_justify = "left"
    return table
