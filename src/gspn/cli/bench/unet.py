"""``gspn bench unet``: the UNet of a text-to-image model with self-attention, with GSPN, and with no token mixer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gspn.tasks.core.errors import require

from .common import (
    Batch,
    Csv,
    Device,
    Dtype,
    MinTime,
    Png,
    Repeats,
    Slowest,
    Threads,
    bench_errors,
    choice,
    count,
    each_at_least,
    prepare,
    run_sweep,
)

if TYPE_CHECKING:
    from gspn.bench.report import Result


def bench_unet(
    arch: Annotated[str, choice("--arch", "NAME", ("sd15", "sdxl"), "Stable Diffusion 1.5 or XL.")] = "sd15",
    size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            callback=each_at_least(64),
            help="Height and width of the images in pixels, a multiple of 64. Repeatable; default: 256, 512, 1024.",
        ),
    ] = None,
    width: Annotated[int, count("Number that divides the widths of the published UNet, for small machines.")] = 1,
    backend: Annotated[
        str,
        choice(
            "--backend", "NAME", ("auto", "flash", "efficient", "cudnn", "math"),
            "Backend of scaled_dot_product_attention; auto leaves the choice to PyTorch.",
        ),
    ] = "auto",
    segment: Annotated[int, count("Number of lines after which local scans restart.")] = 8,
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = None,
    threads: Threads = None,
    slowest: Slowest = 60.0,
    repeats: Repeats = 3,
    min_time: MinTime = 0.1,
    output: Csv = None,
    plot: Png = None,
) -> None:  # fmt: skip
    """Time a denoising call with self-attention, with GSPN (global, shared taps, segments), and with no token mixer.

    Weights are random, which has no effect on time. The UNet with no token mixer is a lower bound on the time of any
    token mixer.

    Each mixer is first compared with its float64 specification. Where an error is more than twice that of the
    specification in the same dtype, nothing is timed and the exit code is 1.
    """
    with bench_errors():
        require("diffusers", extra="diffusers")
        import torch

        from gspn.bench.unet import UNetSweep, over_lower_bound

        where = prepare(device, threads, plot)
        sweep = UNetSweep(
            arch=arch, width=width, batch=batch, dtype=getattr(torch, dtype), device=where, backend=backend,
            segment=segment,
        )  # fmt: skip

        run_sweep(
            sweep, size or (256, 512, 1024), f"UNet of {arch}, width 1/{width}, B{batch} {dtype}, attention {backend}",
            plot_title="A denoising call of a UNet", slowest=slowest, repeats=repeats, min_time=min_time, output=output,
            plot=plot,
            columns=lambda results: {"over the bound": partial(_over_bound, over_lower_bound(results))},
            notes=lambda _: ["the bound: the time with no self-attention; backends include those of cross-attention"],
        )  # fmt: skip


def _over_bound(bounds: Mapping[tuple[str, int], float], r: Result) -> str:
    above = bounds.get((r.name, r.height))
    return "" if above is None else f"{above:.2f}x"
