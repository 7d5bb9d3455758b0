"""The parts that the commands of ``gspn bench`` share: options, the run of a sweep, and its table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gspn._console import Console
from gspn._errors import UsageError

from ..messages import failed, titled_table, wrote
from ..options import figure_file, output_file

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from gspn.bench.environment import Environment
    from gspn.bench.report import Result
    from gspn.bench.size_sweep import SizeSweep

DTYPES = ("float32", "bfloat16", "float16", "float64")
_MOST = 2**31 - 1
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

    text = f"{text} One of {', '.join(choices)}."
    return typer.Option(name, callback=check, metavar=metavar, autocompletion=lambda: list(choices), help=text)


def count(text: str) -> typer.models.OptionInfo:
    """An option that is a number of at least 1."""
    return typer.Option(metavar="N", min=1, max=_MOST, help=text)


def _sizes(text: str) -> list[int]:
    """The sizes that a value of ``--size`` stands for."""
    first, dots, last = text.partition("..")
    try:
        size, end = int(first), int(last) if dots else int(first)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor a range such as 512..16384.") from None
    if not 1 <= size <= end <= _MOST:
        raise typer.BadParameter(f"{text!r} has to be at least 1, and a range has to grow.")
    return [size << doubled for doubled in range((end // size).bit_length())]


Channels = Annotated[int, count("Channels of the map.")]
Sizes = Annotated[
    list[int] | None,
    typer.Option(
        "--size",
        metavar="N",
        parser=_sizes,
        callback=lambda values: sorted({size for one in values or [] for size in one}) or None,
        help="Height and width in pixels, or a range such as 512..2048: each twice the one before. Repeatable.",
    ),
]
Layout = Annotated[str, choice("--memory-format", "LAYOUT", MEMORY_FORMATS, "The layout of maps and weights.")]
Mode = Annotated[
    str, choice("--mode", "MODE", ("forward", "train"), "The forward pass, or forward and backward to every tensor.")
]
Segment = Annotated[int | None, count("Number of lines after which scans restart. Default: never.")]
Slowest = Annotated[
    float, typer.Option(metavar="SECONDS", min=0, help="Longest call; a candidate stops before it is passed.")
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of every benchmark."""

    batch: Annotated[int, count("Maps, or images, in one call.")] = 1
    dtype: Annotated[str, choice("--dtype", "DTYPE", DTYPES, "The dtype of every tensor.")] = "float32"
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N. Default: cuda if there is one, else cpu.")
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1024, help="Number of CPU threads. Default: that of PyTorch."),
    ] = None
    repeats: Annotated[int, count("Fewest samples of each candidate at each size.")] = 5
    min_time: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Least total time of the samples of a candidate.")
    ] = 0.1
    output: Annotated[Path | None, output_file("--output", "-o", metavar="CSV", help="Table to write, as CSV.")] = None
    plot: Annotated[Path | None, figure_file(help="Plot to write")] = None

    def problem(self) -> dict[str, Any]:
        """The options that a benchmark is constructed with: ``batch``, ``dtype`` and ``device``."""
        import torch

        return {"batch": self.batch, "dtype": getattr(torch, self.dtype), "device": self.torch_device()}

    def torch_device(self) -> torch.device:
        """The device, after a check.

        Raises:
            UsageError: it cannot be timed.
        """
        import torch

        name = self.device
        if name is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            problem = f"{name!r} is not a device; use cpu, cuda or cuda:N."
        else:
            count = torch.cuda.device_count()
            if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
                return device
            problem = f"{name!r}: times are taken on cpu and cuda devices; PyTorch sees {count} CUDA devices here."
        raise UsageError(f"--device {problem}")


def bench_command(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the function gets a :class:`Run` and its own options, and the command has the options of both.

    Args:
        **defaults: defaults of shared options that differ from those of :class:`Run`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shared = {f.name: defaults.get(f.name, f.default) for f in fields(Run)}
        hints = get_type_hints(Run, include_extras=True)
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        parameters = own + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
            for name, default in shared.items()
        ]

        @wraps(function)
        def command(**values: Any) -> None:
            import torch

            from gspn.bench.accuracy_check import CheckFailedError

            run = Run(**{name: values.pop(name) for name in shared})
            if run.threads is not None:
                torch.set_num_threads(run.threads)
            try:
                function(run, **values)
            except CheckFailedError as error:
                raise failed(f"the check failed, so nothing was timed: {error}") from None

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def layout(name: str) -> torch.memory_format:
    """The memory format of one of :data:`MEMORY_FORMATS`."""
    import torch

    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def progress_bar() -> Progress:
    """A progress bar on standard error that vanishes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def hardware(here: Environment) -> str:
    """The machine in a few words."""
    return f"{here.device}, {here.threads} CPU threads"


def write_files(
    run: Run, results: Sequence[Result], here: Environment, draw: Callable[[], Figure],
    columns: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Write the CSV and the plot, where they were asked for."""
    from gspn._figures import save_figure
    from gspn.bench.report import COLUMNS, write_csv

    if run.output is not None:
        write_csv(run.output, results, here, columns or COLUMNS)
        wrote(run.output)
    if run.plot is not None:
        save_figure(draw(), run.plot)
        wrote(run.plot)


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

    numbers = ("ms p50", *columns)
    table = titled_table(title, ["size", "candidate"], numbers, box=box.SIMPLE_HEAD, pad_edge=False)
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
    return table


def ratio(result: Result) -> str:
    """The baseline's time over this one's."""
    return "" if result.ratio is None else f"{result.ratio:.2f}x"


def peak(result: Result) -> str:
    """The memory of a call in MB."""
    from gspn.bench.report import plain_number

    return "" if result.peak_bytes is None else plain_number(result.peak_bytes / 1e6)


def run_sweep(
    run: Run,
    sweep: SizeSweep,
    sizes: Sequence[int],
    title: str,
    *,
    plot_title: str,
    slowest: float,
    candidates: Sequence[str] | None = None,
    columns: Columns = lambda _: {},
    notes: Callable[[Sequence[Result]], Sequence[str]] = lambda _: (),
    fit_all: bool = False,
) -> None:
    """Check a sweep, measure it with a progress bar, print its table and write its files.

    Args:
        run: the options of the command.
        sweep: the benchmark.
        sizes: H = W of the maps.
        title: the title of the table, and the subtitle of the plot.
        plot_title: the title of the plot.
        slowest: the longest call in seconds.
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
            sizes, candidates, slowest_ms=slowest * 1e3, repeats=run.repeats, min_time=run.min_time,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
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
    write_files(run, results, here, lambda: plot_sweep(results, growth, plot_title, subtitle))
