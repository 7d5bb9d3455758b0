"""``gspn bench models``: models of timm side by side."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from gspn._console import Console
from gspn._errors import require

from .common import Layout, Run, Sizes, bench_command, choice, hardware, layout, peak, ratio, results_table, write_files


@bench_command(min_time=0.5)
def bench_models(
    run: Run,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="NAME",
            help="Name of a model of timm. Repeatable; default: gspn_tiny, gspn2_tiny, swin_tiny_patch4_window7_224, "
            "vit_small_patch16_224.",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that ratios are to. Default: the first.")
    ] = None,
    size: Sizes = None,
    mode: Annotated[
        str,
        choice(
            "--mode", "MODE", ("inference", "train"), "The forward pass, or forward and backward to every parameter."
        ),
    ] = "inference",
    memory_format: Layout = "channels_last",
) -> None:  # fmt: skip
    """Time models side by side: all candidates take turns within one run.

    Weights are random. The default size is 224; Swin and ViT are built for each. Each model is first run twice: if its
    results are not finite, or differ, nothing is reported and the exit code is 1. A model that does not fit into the
    memory is skipped, with the reason.
    """
    require("timm")
    from gspn.bench import environment, models
    from gspn.bench.report import plain_number, plot_models

    problem = models.ModelsProblem(**run.problem(), mode=mode, memory_format=layout(memory_format))
    with Console(stderr=True).status("starting") as status:
        results = models.measure_models(
            problem, list(dict.fromkeys(model or models.MODELS)), size or models.SIZES[:1], baseline=baseline,
            repeats=run.repeats, min_time=run.min_time, progress=lambda text: status.update(escape(text)),
        )  # fmt: skip
    here = environment.describe(problem.device)
    shape = f"{mode}, B{run.batch} {run.dtype}, {memory_format}"
    columns = {
        "GMACs": lambda r: f"{r.details['macs'] / 1e9:.1f}" if r.details["macs"] else "",
        "images/s": lambda r: plain_number(r.images_per_second),
        "ratio": ratio,
        "peak MB": peak,
    }
    notes = [f"ratio: the time of {results[0].baseline} over this one's; peak: memory of a call without weights"]
    Console().print(results_table(results, f"models, {shape}\n{hardware(here)}", columns, notes))
    subtitle = f"{hardware(here)}   ·   {shape}"
    write_files(run, results, here, lambda: plot_models(results, "Models side by side", subtitle))
