"""``gspn bench mixer``: GSPN's token mixer beside softmax and linear attention on growing maps."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import (
    Batch,
    Channels,
    Csv,
    Device,
    Dtype,
    MinTime,
    Mode,
    Png,
    Repeats,
    Sizes,
    Slowest,
    Threads,
    bench_errors,
    count,
    prepare,
    run_sweep,
)


def bench_mixer(
    channels: Channels = 96,
    proxy_dim: Annotated[int | None, count("Channels of the proxy. Default: 8, and 2 with shared taps.")] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="Time GSPN with its two projections alone, without convolution and norms.")
    ] = False,
    batch: Batch = 1,
    size: Sizes = None,
    dtype: Dtype = "float32",
    mode: Mode = "forward",
    slowest: Slowest = 1.0,
    device: Device = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    min_time: MinTime = 0.1,
    output: Csv = None,
    plot: Png = None,
) -> None:
    """Time GSPNMixer and self-attention of the same width, softmax and linear, on maps from 16 to 512.

    Attention has its four projections and heads of 64 channels, or of 32; PyTorch chooses the backend. GSPN has taps
    for each channel, or taps shared by all channels. Maps are channels_last, which no candidate copies.

    Each candidate is first compared with its float64 specification. Where an error is more than twice that of the
    specification in the same dtype, nothing is timed and the exit code is 1.
    """
    with bench_errors():
        import torch

        from gspn.bench.mixer import SIZES, MixerSweep

        where = prepare(device, threads, plot)
        sweep = MixerSweep(
            channels=channels, proxy_dim=proxy_dim, bare=bare, batch=batch, dtype=getattr(torch, dtype), device=where,
            mode=mode,
        )  # fmt: skip
        run_sweep(
            sweep, size or SIZES, f"token mixers, {mode}, B{batch} C{channels} {dtype}",
            plot_title="A token mixer on growing maps", slowest=slowest, repeats=repeats, min_time=min_time,
            output=output, plot=plot,
        )  # fmt: skip
