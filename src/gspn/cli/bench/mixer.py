"""``gspn bench mixer``: GSPN's token mixer beside softmax and linear attention on growing maps."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Channels, Mode, Run, Sizes, Slowest, bench_command, count, run_sweep


@bench_command()
def bench_mixer(
    run: Run,
    channels: Channels = 96,
    proxy_dim: Annotated[int | None, count("Channels of the proxy. Default: 8, and 2 with shared taps.")] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="Time GSPN with its two projections alone, without convolution and norms.")
    ] = False,
    size: Sizes = None,
    mode: Mode = "forward",
    slowest: Slowest = 1.0,
) -> None:
    """Time GSPNMixer and self-attention of the same width, softmax and linear, on maps from 16 to 512.

    Attention has its four projections and heads of 64 channels, or of 32; PyTorch chooses the backend. GSPN has taps
    for each channel, or taps shared by all channels. Maps are channels_last, which no candidate copies.

    Each candidate is first compared with its float64 specification. Where an error is more than twice that of the
    specification in the same dtype, nothing is timed and the exit code is 1.
    """
    from gspn.bench.mixer import SIZES, MixerSweep

    sweep = MixerSweep(channels=channels, proxy_dim=proxy_dim, bare=bare, mode=mode, **run.problem())
    title = f"token mixers, {mode}, B{run.batch} C{channels} {run.dtype}"
    run_sweep(run, sweep, size or SIZES, title, plot_title="A token mixer on growing maps", slowest=slowest)
