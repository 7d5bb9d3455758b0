"""``gspn bench propagate`` and ``scaling``: the operator on growing maps, beside its unfused form and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gspn.ops.implementations import IMPLEMENTATIONS

from ..messages import failed
from .common import (
    Channels,
    Columns,
    Layout,
    Mode,
    Run,
    Segment,
    Sizes,
    Slowest,
    bench_command,
    choice,
    count,
    layout,
    run_sweep,
)

if TYPE_CHECKING:
    from gspn.bench.propagate import PropagateSweep
    from gspn.bench.report import Result

ProxyDim = Annotated[int, count("Channels of the proxy.")]
Shared = Annotated[bool, typer.Option("--shared", help="Share one set of taps among all channels.")]


@bench_command(min_time=0.3)
def bench_propagate(
    run: Run,
    channels: Channels = 640,
    proxy_dim: ProxyDim = 8,
    shared: Shared = False,
    segment: Segment = None,
    size: Sizes = None,
    mode: Mode = "forward",
    memory_format: Layout = "contiguous",
    impl: Annotated[
        str, choice("--impl", "IMPL", ["auto", *IMPLEMENTATIONS], "The implementation of propagate.")
    ] = "auto",
    slowest: Slowest = 20.0,
) -> None:
    """Time gspn.propagate, its unfused form with every map in memory, self-attention and linear attention.

    The default sizes are 64 and 128. The unfused form runs the fastest line_scan. Attention gets its queries, keys and
    values ready, in heads of 64 channels; the table names the backend that PyTorch chose.

    The operator is first compared with its float64 specification. Where an error is more than twice that of plain
    PyTorch, nothing is timed and the exit code is 1.
    """
    from gspn.bench import propagate as bench

    sweep = bench.PropagateSweep(
        channels=channels, proxy_dim=proxy_dim, shared=shared, segment=segment, mode=mode,
        memory_format=layout(memory_format), impl=impl, **run.problem(),
    )  # fmt: skip

    def notes(results: Sequence[Result]) -> list[str]:
        rate = bench.matmul_rate(sweep.device, sweep.dtype)
        lines = [f"matrix product of 1024: {rate / 1e9:.0f} GFLOP/s"]
        for r in results:
            if r.name == bench.PROPAGATE and r.timing is not None and mode == "forward":
                total = bench.operations(channels, proxy_dim, sweep.groups) * run.batch * channels * r.height * r.width
                speed = total / (r.timing.p50 / 1e3)
                lines.append(f"propagate at {r.height}: {speed / 1e9:.0f} GFLOP/s, {speed / rate:.0%} of it")
        return lines

    run_sweep(
        run, sweep, size or (64, 128), _title("propagate", sweep), plot_title="gspn.propagate beside attention",
        slowest=slowest, columns=_columns(sweep), notes=notes,
    )  # fmt: skip


@bench_command(min_time=0.3)
def bench_scaling(
    run: Run,
    channels: Channels = 32,
    proxy_dim: ProxyDim = 8,
    shared: Shared = False,
    segment: Segment = None,
    size: Sizes = None,
    attention: Annotated[bool, typer.Option(help="Time self-attention too.")] = False,
    mode: Mode = "forward",
    memory_format: Layout = "channels_last",
    slowest: Slowest = 60.0,
) -> None:
    """Time gspn.propagate on maps from 128 to 2048 and fit p in time ~ pixels^p over all of them.

    Sizes whose maps do not fit into the free memory are left out and named.
    """
    from gspn.bench import environment
    from gspn.bench import propagate as bench

    sweep = bench.PropagateSweep(
        channels=channels, proxy_dim=proxy_dim, shared=shared, segment=segment, mode=mode,
        memory_format=layout(memory_format), **run.problem(),
    )  # fmt: skip
    sizes = sorted(set(size or (128, 256, 512, 1024, 2048)))
    free = environment.free_memory(sweep.device)
    # x, y and as much again while they are computed; with all gradients and the copies that autograd keeps.
    maps = 4 if mode == "forward" else 8
    needed = {n: n * n * run.batch * channels * sweep.dtype.itemsize * maps for n in sizes}
    fitting = [n for n in sizes if free is None or needed[n] < free]
    left_out = [f"{n} x {n} left out: {needed[n] / 1e9:.1f} GB" for n in sizes if n not in fitting]
    if not fitting:
        raise failed(f"no size fits: {', '.join(left_out)}. Use a smaller --size or --channels.")
    run_sweep(
        run, sweep, fitting, _title("scaling", sweep), plot_title="Time on growing maps", slowest=slowest,
        candidates=(bench.PROPAGATE, bench.SELF_ATTENTION) if attention else (bench.PROPAGATE,),
        columns=_columns(sweep), notes=lambda _: left_out, fit_all=True,
    )  # fmt: skip


def _title(command: str, sweep: PropagateSweep) -> str:
    taps = "shared taps" if sweep.shared else "per-channel taps"
    shape = f"B{sweep.batch} C{sweep.channels} S{sweep.proxy_dim} {str(sweep.dtype).removeprefix('torch.')}"
    return f"{command}, {sweep.mode}, {shape}, {taps}"


def _columns(sweep: PropagateSweep) -> Columns:
    def of_x(r: Result) -> str:
        x_bytes = r.batch * sweep.channels * r.height * r.width * sweep.dtype.itemsize
        return "" if r.peak_bytes is None else f"{r.peak_bytes / x_bytes:.2f}"

    return lambda _: {"peak/x": of_x}
