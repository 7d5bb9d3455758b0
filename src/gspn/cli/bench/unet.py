"""``gspn bench unet``: the UNet of a text-to-image model with its self-attention, with GSPN, and with neither."""

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
    wrote,
)

if TYPE_CHECKING:
    from gspn.bench.comparison import Result

_ARCHITECTURES = ("sd15", "sdxl")
_BACKENDS = ("auto", "flash", "efficient", "cudnn", "math")


def bench_unet(
    arch: Annotated[str, choice("--arch", "NAME", _ARCHITECTURES, "Stable Diffusion 1.5 or XL.")] = "sd15",
    size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            callback=each_at_least(64),
            help="H = W of the images in pixels, a multiple of 64. Repeatable; default: 256, 512, 1024.",
        ),
    ] = None,
    sizes: Annotated[str | None, typer.Option(metavar="N,N,...", help="Further sizes, in one: 512,1024,2048.")] = None,
    width: Annotated[int, count("Divides the widths of the real UNet, for small machines.")] = 1,
    backend: Annotated[
        str, choice("--backend", "NAME", _BACKENDS, "Of scaled_dot_product_attention; auto: what PyTorch takes.")
    ] = "auto",
    segment: Annotated[int, count("Lines after which the local scans restart.")] = 8,
    batch: Annotated[int, count("Latents in a call; guidance doubles them in use.")] = 1,
    dtype: Annotated[str, choice("--dtype", "DTYPE", list(DTYPES), "Of weights and latents.")] = "float32",
    device: Device = None,
    threads: Threads = None,
    slowest: Annotated[
        float, typer.Option(metavar="SECONDS", callback=at_least(0), help="Longest call; beyond, a candidate ends.")
    ] = 60.0,
    repeats: Annotated[int, count("Fewest samples of each candidate at each size.")] = 3,
    min_time: MinTime = 0.1,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time a denoising call with self-attention, with GSPN in its place (global, shared taps, local), and with neither.

    Weights are random: time does not depend on them. What has no self-attention at all is the floor that no operator in
    its place can pass.

    Each mixer is first held against its float64 specification; where an error is more than twice that of the
    specification in the same dtype, nothing is timed and the exit code is 1.
    """
    try:
        from gspn.bench import unet
    except ImportError as error:
        raise failed(str(error)) from None

    where = device_named(device)
    if plot is not None:
        check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    asked = sorted({*(size or ()), *_listed(sizes)})
    problem = unet.UNetProblem(arch, width, batch, DTYPES[dtype], where, backend, segment)
    with progress_bar() as bar:
        task = bar.add_task("timing", total=None)
        try:
            found = unet.check_mixers(problem)
            red = {name: figures for name, figures in found.items() if not all(f.ok for f in figures)}
            if red:
                bar.stop()
                raise failed(f"the check failed, so nothing was timed: {red_figures(red)}")
            results = unet.measure_unets(
                problem,
                sizes=asked or (256, 512, 1024),
                slowest_ms=slowest * 1e3,
                repeats=repeats,
                min_time=min_time,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except ValueError as error:
            bar.stop()
            raise typer.BadParameter(str(error)) from None
        except torch.OutOfMemoryError as error:
            bar.stop()
            raise failed(f"out of memory on {where}: {error}\nUse a smaller --size, or --width.") from None

    here = environment.describe(where)
    console = Console()
    title = f"UNet of {arch}, width 1/{width}, B{batch} {dtype}, attention {backend}"
    console.print(_table(results, unet.over_floor(results), f"{title}\n{hardware(here)}"))
    if output is not None:
        from gspn.bench.comparison import write_results

        write_results(output, results, here)
        wrote(console, output)
    if plot is not None:
        from gspn.bench.comparison_plot import plot_mixers

        figure = plot_mixers(
            results, unet.exponents(results), "A denoising call of a UNet", f"{hardware(here)}   ·   {title}"
        )
        report.save_figure(figure, plot)
        wrote(console, plot)


def _listed(sizes: str | None) -> list[int]:
    parts = [] if sizes is None else [one.strip() for one in sizes.split(",")]
    wrong = [one for one in parts if not one.isdigit() or int(one) < 64]
    if wrong:
        raise typer.BadParameter(f"--sizes has {wrong[0]!r}; give numbers of 64 and more, as 512,1024,2048.")
    return [int(one) for one in parts]


def _table(results: Sequence[Result], over_floor: Mapping[tuple[str, int], float], title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for heading, justify in (("pixels", "left"), ("candidate", "left")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for heading in ("ms p50", "over attention", "over the floor", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if r.timing is None:
            continue
        if previous is not None and r.height != previous:
            table.add_section()
        size = "" if r.height == previous else f"{r.height} x {r.width}"
        previous = r.height
        above = over_floor.get((r.name, r.height))
        table.add_row(
            size,
            r.name,
            report.plain_number(r.timing.p50),
            "" if r.ratio is None else f"{r.ratio:.2f}x",
            "" if above is None else f"{above:.2f}x",
            "" if r.peak_bytes is None else report.plain_number(r.peak_bytes / 1e6),
        )
    backends = dict.fromkeys(r.attention for r in results if r.attention not in ("", "none"))
    lines = [
        "over attention: its time over this one's, above 1 is faster; the floor: no self-attention at all",
        f"attention backend, of cross-attention too: {', '.join(backends) or 'not run'}",
        *(f"{r.name} ends before {r.height} x {r.width}: {r.skipped}" for r in results if r.skipped),
    ]
    table.caption = escape("\n".join(lines))
    table.caption_justify = "left"
    return table
