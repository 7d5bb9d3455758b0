"""``gspn bench unet``: the UNet of a text-to-image model with self-attention, with GSPN, and with no token mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from gspn._console import Console
from gspn._errors import UsageError, require

from ..messages import titled_table, wrote
from .common import Run, Sizes, Slowest, bench_command, choice, count, hardware, run_sweep

if TYPE_CHECKING:
    from gspn.bench.report import Result
    from gspn.bench.unet import UNetSweep
    from gspn.bench.unet_table import Total

_BACKENDS = ("auto", "flash", "efficient", "cudnn", "math")


@bench_command(repeats=3)
def bench_unet(
    run: Run,
    arch: Annotated[str, choice("--arch", "NAME", ("sd15", "sdxl"), "Stable Diffusion 1.5 or XL.")] = "sd15",
    size: Sizes = None,
    width: Annotated[int, count("Number that divides the widths of the published UNet, for small machines.")] = 1,
    backend: Annotated[
        str,
        choice(
            "--backend", "NAME", _BACKENDS,
            "Backend of scaled_dot_product_attention; auto leaves the choice to PyTorch.",
        ),
    ] = "auto",
    segment: Annotated[int, count("Number of lines after which local scans restart.")] = 8,
    slowest: Slowest = 60.0,
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Time each layer by itself and add up: for sizes where no call ends.")
    ] = False,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            "--steps", metavar="N", min=1,
            help="Number of denoising steps of an image in the table of --by-layer. Repeatable; default: 30 and 4.",
        ),
    ] = None,
    processor_time: Annotated[
        bool,
        typer.Option("--processor-time", help="Count processor time, for --by-layer on a machine shared with others."),
    ] = False,
) -> None:  # fmt: skip
    """Time a denoising call with self-attention, with GSPN (global, shared taps, segments), and with no token mixer.

    Weights are random, which has no effect on time. The UNet with no token mixer is a lower bound on the time of any
    token mixer. Sizes are multiples of 64; by default 256, 512 and 1024.

    With --by-layer no UNet is built. Each distinct layer is timed alone at its true width and size, as a strip of rows
    where the whole takes too long, and multiplied by the number of its calls. Attention between tokens is timed up to
    --slowest, and beyond by the power of the tokens fitted on its three largest sizes. The sum is compared with a whole
    call at the sizes where it is below --slowest. A row for each layer goes to --output as it comes, and a run with the
    same --output continues the last one.

    Each mixer is first compared with its float64 specification. Where an error is more than twice that of the
    specification in the same dtype, nothing is timed and the exit code is 1.
    """
    require("diffusers", extra="diffusers")
    from gspn.bench.unet import UNetSweep, over_lower_bound

    def over_bound(results: Sequence[Result]) -> dict[str, Callable[[Result], str]]:
        ratios = over_lower_bound(results)
        return {"over the bound": lambda r: f"{ratios[r.name, r.height]:.2f}x" if (r.name, r.height) in ratios else ""}

    sweep = UNetSweep(arch=arch, width=width, backend=backend, segment=segment, **run.problem())
    if by_layer:
        _run_by_layer(run, sweep, size or (256, 512, 1024), steps or (30, 4), slowest, processor_time)
        return
    if steps or processor_time:
        raise UsageError("--steps and --processor-time are for --by-layer.")
    run_sweep(
        run, sweep, size or (256, 512, 1024),
        f"UNet of {arch}, width 1/{width}, B{run.batch} {run.dtype}, attention {backend}",
        plot_title="A denoising call of a UNet", slowest=slowest, columns=over_bound,
        notes=lambda _: ["the bound: the time with no self-attention; backends include those of cross-attention"],
    )  # fmt: skip


def _run_by_layer(
    run: Run, sweep: UNetSweep, sizes: Sequence[int], steps: Sequence[int], slowest: float, processor_time: bool
) -> None:
    import torch

    from gspn._figures import save_figure
    from gspn.bench import environment
    from gspn.bench.accuracy_check import require_accurate
    from gspn.bench.report import plot_layers
    from gspn.bench.unet_table import LayerBench, LayerTimes, fits, totals

    if processor_time and (sweep.device.type != "cpu" or torch.get_num_threads() > 1):
        raise UsageError(
            "--processor-time adds up the time of all threads of a CPU: use it with --device cpu --threads 1."
        )
    here = environment.describe(sweep.device)
    with Console(stderr=True).status("starting") as status:
        bench = LayerBench(
            sweep=sweep, times=LayerTimes(run.output, here), repeats=run.repeats, slowest_ms=slowest * 1e3,
            processor_time=processor_time, progress=lambda line: status.update(escape(line)),
        )  # fmt: skip
        require_accurate(bench.check())
        rows = bench.run(sizes)
    sums = totals(rows)
    title = f"UNet of {sweep.arch} by layer, width 1/{sweep.width}, B{run.batch} {run.dtype}"
    where = f"{hardware(here)}{', processor time' if processor_time else ''}"
    console = Console()
    console.print(_sums_table(sums, steps, f"{title}\n{where}", fits(rows)))
    console.print(_shares_table(sums))
    if run.output is not None:
        wrote(run.output)
    if run.plot is not None:
        save_figure(
            plot_layers(sums, "A denoising call of a UNet, added up from its layers", f"{where}   ·   {title}"),
            run.plot,
        )
        wrote(run.plot)


def _sums_table(sums: Sequence[Total], steps: Sequence[int], title: str, notes: Sequence[str]) -> Table:
    from gspn.bench.report import plain_number
    from gspn.bench.unet import GSPN, NO_MIXER

    of_steps = tuple(f"{count} steps, s" for count in steps)
    columns = ("s a call", "over GSPN", "over the bound", "sum to whole", *of_steps)
    table = titled_table(title, ["size", "candidate"], columns, box=box.SIMPLE_HEAD, pad_edge=False)
    at = {(one.size, one.candidate): one.ms for one in sums}
    previous = None
    for one in sums:
        if previous not in (None, one.size):
            table.add_section()
        table.add_row(
            "" if one.size == previous else f"{one.size} x {one.size}",
            escape(one.candidate),
            f"{'~' if one.fitted else ''}{plain_number(one.ms / 1e3)}",
            f"{plain_number(one.ms / at[one.size, GSPN])}x",
            f"{plain_number(one.ms / at[one.size, NO_MIXER])}x",
            "" if one.error is None else f"{one.error:+.1%}",
            *(plain_number(count * one.ms / 1e3) for count in steps),
        )
        previous = one.size
    lines = ["the bound: the time with no self-attention; steps: calls without guidance; ~: partly fitted", *notes]
    table.caption = escape("\n".join(lines))
    return table


def _shares_table(sums: Sequence[Total]) -> Table:
    kinds = list(sums[0].by_kind)
    table = titled_table(
        "shares of the kinds of layers", ["size", "candidate"], kinds, box=box.SIMPLE_HEAD, pad_edge=False
    )
    for one in sums:
        shares = (f"{ms / one.ms:.1%}" for ms in one.by_kind.values())
        table.add_row(f"{one.size} x {one.size}", escape(one.candidate), *shares)
    return table
