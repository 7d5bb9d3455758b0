"""The parts that the commands of ``gspn bench`` share: options, their checks, the run of a sweep, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..messages import failed, wrote

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from gspn.bench.environment import Environment
    from gspn.bench.report import Result
    from gspn.bench.size_sweep import SizeSweep

DTYPES = ("float32", "bfloat16", "float16", "float64")
MEMORY_FORMATS = ("contiguous", "channels_last")
Columns = Callable[[Sequence["Result"]], Mapping[str, Callable[["Result"], str]]]
"""Further columns of a table: from all results to the columns, each from its result."""


def choice(name: str, metavar: str, choices: Sequence[str], text: str) -> typer.models.OptionInfo:
    """An option with a few values, which refuses any other."""

    def check(value: str | list[str] | None) -> str | list[str] | None:
        for one in [value] if isinstance(value, str) else value or []:
            if one not in choices:
                raise typer.BadParameter(f"{one!r} is not one of {', '.join(choices)}.")
        # A repeated value would be timed against itself.
        return list(dict.fromkeys(value)) if isinstance(value, list) else value

    return typer.Option(
        name,
        callback=check,
        metavar=metavar,
        autocompletion=lambda: list(choices),
        help=f"{text} One of {', '.join(choices)}.",
    )


def at_least(least: float) -> Callable[[float | None], float | None]:
    """An option's callback that refuses a number below ``least``, showing both."""

    def check(value: float | None) -> float | None:
        if value is not None and not value >= least:  # also refuses nan
            raise typer.BadParameter(f"{value} is below {least}.")
        return value

    return check


def each_at_least(least: int) -> Callable[[list[int] | None], list[int] | None]:
    """The same for a repeatable option, whose values come back sorted and once each."""

    def check(value: list[int] | None) -> list[int] | None:
        for one in value or []:
            if one < least:
                raise typer.BadParameter(f"{one} is below {least}.")
        return sorted(set(value)) if value else value

    return check


def count(text: str) -> typer.models.OptionInfo:
    """An option that is a number of at least 1."""
    return typer.Option(metavar="N", callback=at_least(1), help=text)


Batch = Annotated[int, count("Maps, or images, in one call.")]
Channels = Annotated[int, count("Channels of the map.")]
Sizes = Annotated[
    list[int] | None,
    typer.Option("--size", metavar="N", callback=each_at_least(1), help="Height and width in pixels. Repeatable."),
]
Dtype = Annotated[str, choice("--dtype", "DTYPE", DTYPES, "The dtype of every tensor.")]
Layout = Annotated[str, choice("--memory-format", "LAYOUT", MEMORY_FORMATS, "The layout of maps and weights.")]
Mode = Annotated[
    str, choice("--mode", "MODE", ("forward", "train"), "The forward pass, or forward and backward to every tensor.")
]
Slowest = Annotated[
    float,
    typer.Option(metavar="SECONDS", callback=at_least(0), help="Longest call; a candidate stops before it is passed."),
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N. Default: cuda if there is one, else cpu.")
]
Threads = Annotated[int | None, count("Number of CPU threads. Default: that of PyTorch.")]
Repeats = Annotated[int, count("Fewest samples of each candidate at each size.")]
MinTime = Annotated[
    float, typer.Option(metavar="SECONDS", callback=at_least(0), help="Least total time of the samples of a candidate.")
]
Csv = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="CSV", dir_okay=False, help="Table to write, as CSV.")
]
Png = Annotated[Path | None, typer.Option(metavar="PNG", dir_okay=False, help="Plot to write; needs matplotlib.")]


@contextmanager
def bench_errors() -> Iterator[None]:
    """Turn the errors of a benchmark into messages: a wrong option, a failed check, too little memory."""
    import torch

    from gspn.bench.accuracy_check import CheckFailedError

    try:
        yield
    except CheckFailedError as error:
        raise failed(f"the check failed, so nothing was timed: {error}") from None
    except torch.OutOfMemoryError as error:
        raise failed(f"out of memory: {error}\nUse a smaller --batch, --channels or --size.") from None
    except ImportError as error:
        raise failed(str(error)) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def prepare(device: str | None, threads: int | None, plot: Path | None) -> torch.device:
    """Check ``--plot``, set the threads, and return the device.

    Raises:
        typer.BadParameter: the plot cannot be written, or the device cannot be timed.
    """
    import torch

    from gspn._figures import require_matplotlib

    if plot is not None:
        try:
            require_matplotlib()
        except ImportError as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from None
        if plot.suffix.lower() != ".png":
            raise typer.BadParameter(f"{str(plot)!r} does not end in .png.", param_hint="--plot")
    if threads is not None:
        torch.set_num_threads(threads)
    return _device_named(device)


def layout(name: str) -> torch.memory_format:
    """The memory format of one of :data:`MEMORY_FORMATS`."""
    import torch

    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def _device_named(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is not a device; use cpu, cuda or cuda:N.", param_hint="--device") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: times are taken on cpu and cuda devices.", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"{name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here.", param_hint="--device"
        )
    return device


def progress_bar() -> Progress:
    """A progress bar on standard error that vanishes when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def hardware(here: Environment) -> str:
    """The machine in a few words."""
    return f"{here.device}, {here.threads} CPU threads"


def report(
    results: Sequence[Result], here: Environment, output: Path | None, plot: Path | None, draw: Callable[[], Figure],
    columns: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Write the CSV and the plot that were asked for."""
    from gspn._figures import save_figure
    from gspn.bench.report import COLUMNS, write_csv

    if output is not None:
        write_csv(output, results, here, columns or COLUMNS)
        wrote(output)
    if plot is not None:
        save_figure(draw(), plot)
        wrote(plot)


def results_table(
    results: Sequence[Result], title: str, columns: Mapping[str, Callable[[Result], str]], notes: Sequence[str]
) -> Table:
    """A table of results, one section for each size; skipped ones and their reasons are in the caption.

    Args:
        results: the results of one benchmark.
        title: the title.
        columns: the columns after size, candidate and milliseconds, each from a result.
        notes: lines of the caption.
    """
    from gspn.bench.attention import NO_ATTENTION
    from gspn.bench.report import plain_number

    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("size", no_wrap=True)
    table.add_column("candidate", no_wrap=True)
    for heading in ("ms p50", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if r.timing is not None:
            if previous not in (None, r.height):
                table.add_section()
            size = "" if r.height == previous else f"{r.width} x {r.height}"
            previous = r.height
            cells = [column(r) for column in columns.values()]
            table.add_row(size, escape(r.name), plain_number(r.timing.p50), *cells)
    backends = {r.name: r.details["attention"] for r in results if r.details["attention"] not in ("", NO_ATTENTION)}
    lines = [
        *notes,
        *(f"attention backend of {name}: {backend}" for name, backend in backends.items()),
        *(f"{r.name} ends before {r.width} x {r.height}: {r.skipped}" for r in results if r.skipped),
    ]
    table.caption = escape("\n".join(lines))
    table.caption_justify = "left"
    return table


def ratio(result: Result) -> str:
    """The baseline's time over this one's."""
    return "" if result.ratio is None else f"{result.ratio:.2f}x"


def peak(result: Result) -> str:
    """The memory of a call in MB."""
    from gspn.bench.report import plain_number

    return "" if result.peak_bytes is None else plain_number(result.peak_bytes / 1e6)


def run_sweep(
    sweep: SizeSweep,
    sizes: Sequence[int],
    title: str,
    *,
    plot_title: str,
    slowest: float,
    repeats: int,
    min_time: float,
    output: Path | None,
    plot: Path | None,
    candidates: Sequence[str] | None = None,
    columns: Columns = lambda _: {},
    notes: Callable[[Sequence[Result]], Sequence[str]] = lambda _: (),
    fit_all: bool = False,
) -> None:
    """Check a sweep, measure it with a progress bar, print its table and write its files.

    Args:
        sweep: the benchmark.
        sizes: H = W of the maps.
        title: the title of the table, and the subtitle of the plot.
        plot_title: the title of the plot.
        slowest: the longest call in seconds.
        repeats: the fewest samples.
        min_time: the least total time of the samples in seconds.
        output: the CSV to write.
        plot: the PNG to write.
        candidates: which to time; all by default.
        columns: further columns of the table, from the results.
        notes: further lines of the caption, from the results.
        fit_all: whether exponents are fitted over all sizes instead of the largest.
    """
    from gspn.bench import environment
    from gspn.bench.accuracy_check import require_accurate
    from gspn.bench.report import plot_sweep
    from gspn.bench.size_sweep import FITTED, exponents

    with progress_bar() as bar:
        task = bar.add_task("timing", total=None)
        require_accurate(sweep.check())
        results = sweep.measure(
            sizes,
            candidates,
            slowest_ms=slowest * 1e3,
            repeats=repeats,
            min_time=min_time,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    here = environment.describe(sweep.device)
    growth = exponents(results, None if fit_all else FITTED)
    lines = [f"ratio: the time of {sweep.baseline} over this one's; peak: memory of a call beyond its arguments"]
    if growth:
        which = "all" if fit_all else "the largest"
        lines.append(f"time ~ pixels^p, p on {which} maps: " + ", ".join(f"{n} {p:.2f}" for n, p in growth.items()))
    all_columns = {"ratio": ratio, "peak MB": peak, **columns(results)}
    table = results_table(results, f"{title}\n{hardware(here)}", all_columns, [*lines, *notes(results)])
    Console().print(table)
    subtitle = f"{hardware(here)}   ·   {title}"
    report(results, here, output, plot, lambda: plot_sweep(results, growth, plot_title, subtitle))
