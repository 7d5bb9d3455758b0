"""``gspn bench models``: networks of timm side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich import box
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
    check_plot,
    choice,
    count,
    device_named,
    each_at_least,
    failed,
    hardware,
    require_timm,
    wrote,
)

if TYPE_CHECKING:
    from gspn.bench.comparison import Result

_MODES = ("inference", "train")


def bench_models(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Any of timm's. Repeatable; default: gspn_tiny, gspn2_tiny, swin_tiny_patch4_window7_224, "
            "vit_small_patch16_224.",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that ratios are to. Default: the first.")
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(metavar="N", callback=each_at_least(1), help="H = W of the images. Repeatable; default: 224."),
    ] = None,
    mode: Annotated[
        str, choice("--mode", "MODE", _MODES, "Forward alone, or forward and backward to every parameter.")
    ] = "inference",
    batch: Annotated[int, count("Images at a time.")] = 1,
    dtype: Annotated[str, choice("--dtype", "DTYPE", list(DTYPES), "Of weights and images.")] = "float32",
    memory_format: Annotated[
        str, choice("--memory-format", "LAYOUT", list(MEMORY_FORMATS), "Of weights and images.")
    ] = "channels_last",
    device: Device = None,
    threads: Threads = None,
    repeats: Annotated[int, count("Fewest samples of each model.")] = 5,
    min_time: MinTime = 0.5,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time networks side by side: all candidates take turns within one run.

    Weights are random. Swin and ViT are built for each size. Each network is first run twice: if its results are not
    finite, or differ, nothing is reported and the exit code is 1. One that the memory would not hold is skipped, with
    the reason.
    """
    require_timm()
    from gspn.bench import models

    where = device_named(device)
    if plot is not None:
        check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    names = list(dict.fromkeys(model or models.MODELS))
    problem = models.ModelsProblem(
        batch=batch,
        dtype=DTYPES[dtype],
        device=where,
        mode=mode,
        memory_format=MEMORY_FORMATS[memory_format],
    )
    console = Console()
    with Console(stderr=True).status("starting") as status:
        try:
            results = models.measure_models(
                problem,
                names,
                size or (models.SIZES[0],),
                baseline=baseline,
                repeats=repeats,
                min_time=min_time,
                progress=lambda what: status.update(escape(what)),
            )
        except models.CheckFailedError as error:
            raise failed(f"the check failed, so nothing is reported: {error}") from None
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    here = environment.describe(where)
    shape = f"{mode}, B{batch} {dtype}, {memory_format}"
    console.print(_table(results, f"networks, {shape}\n{hardware(here)}"))
    if output is not None:
        from gspn.bench.comparison import write_results

        write_results(output, results, here)
        wrote(console, output)
    if plot is not None:
        from gspn.bench.comparison_plot import plot_models

        report.save_figure(plot_models(results, "Networks side by side", f"{hardware(here)}   ·   {shape}"), plot)
        wrote(console, plot)


def _table(results: Sequence[Result], title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("GMACs", "ms p50", "images/s", "ratio", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if r.height != previous:
            table.add_row(f"[bold]{r.height} x {r.width}[/]")
        previous = r.height
        speed = r.images_per_second
        table.add_row(
            escape(r.name),
            "" if r.macs is None else f"{r.macs / 1e9:.1f}",
            "skipped" if r.timing is None else report.plain_number(r.timing.p50),
            "" if speed is None else report.plain_number(speed),
            "" if r.ratio is None else f"{r.ratio:.2f}x",
            "" if r.peak_bytes is None else report.plain_number(r.peak_bytes / 1e6),
            style="dim" if r.timing is None else None,
        )
    backends = {r.name: r.attention for r in results if r.attention not in ("", "none")}
    lines = [
        f"ratio: {results[0].baseline}'s time over this one's in the same run; peak: of a call, without weights",
        *(f"attention of {name}: {backend}" for name, backend in backends.items()),
        *(f"{r.name} skipped at {r.height} x {r.width}: {r.skipped}" for r in results if r.skipped),
    ]
    table.caption = escape("\n".join(lines))
    table.caption_justify = "left"
    return table
