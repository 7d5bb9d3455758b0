"""``gspn classify``: train, evaluate and apply classifiers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from gspn._console import Console
from gspn._files import printable
from gspn.tasks import classify as task

from .app import App
from .distill import student_or_name
from .messages import facts_table, warn, warn_broken, wrote
from .options import (
    BatchSize,
    Device,
    DeviceName,
    ImageData,
    Precision,
    PrecisionName,
    Results,
    Root,
    Workers,
    figure_file,
)
from .training import FLAGS, Flag, TrainingCommand, add_training_commands

if TYPE_CHECKING:
    from gspn.tasks.classify import Evaluation

_MODEL = (
    "The directory of a run, also one of gspn distill train, the name of a timm model with weights, or "
    "hf-hub:OWNER/NAME."
)

_FIT = (
    "How images come to the model: resized and cropped to its input; whole, with the same resize and no crop; or "
    "native, at their own size. Images of several sizes are padded to the largest of their batch, and each is "
    "classified as if it were alone."
)


class FitName(StrEnum):
    """The choices of ``--fit``."""

    crop = "crop"
    whole = "whole"
    native = "native"


app = App(help="Train, evaluate and apply image classifiers: the models of gspn, and any of timm.")


def _done(result: Any) -> str:
    best = escape(str(result.output / "best"))
    return f"best top-1 [bold]{result.best_score:.2f}[/] after epoch {result.best_epoch}: {best}"


add_training_commands(
    app,
    TrainingCommand(
        task.TrainConfig,
        lambda *args, **options: task.train(*args, **options),
        "Train a classifier.",
        _done,
        {
            "model": Flag("model.name", "NAME", "Name of the model, one of gspn or any of timm."),
            "lr": replace(FLAGS["lr"], help="Learning rate, for optim.lr_base_batch images an update."),
        },
    ),
)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    data: ImageData,
    root: Root = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the data set.")] = "val",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    precision: Precision = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Use the channels_last layout for images and weights.")
    ] = False,
    fit: Annotated[FitName, typer.Option(help=_FIT)] = FitName.crop,
    output: Results = None,
    confusion: Annotated[
        Path | None, figure_file(help="Plot of the confusion matrix to write", endings=(".png", ".pdf", ".svg"))
    ] = None,
) -> None:
    """Measure accuracy, confusions, speed and memory of a trained classifier."""
    from gspn.tasks.classify.confusion import save_confusion

    console = Console()
    result = task.evaluate(
        student_or_name(model, "classify"), data=data, root=root, split=split, batch_size=batch_size, workers=workers,
        precision=precision.value, device=device.value, channels_last=channels_last, fit=fit.value, console=console,
    )  # fmt: skip
    if not result.is_main:
        return
    result = replace(result, model=model)  # of a student, too
    console.print(facts_table(_facts(result)))
    warn_broken(result.broken)
    if output is not None:
        result.write_json(output / "evaluation.json")
        wrote(output / "evaluation.json")
    if confusion is not None:
        save_confusion(result, confusion)
        wrote(confusion)


def _facts(result: Evaluation) -> dict[str, str]:
    return {
        "model": f"{result.model}, {result.parameters / 1e6:.2f} M parameters",
        "data": f"{result.data}/{result.split}, {result.images:,} images, {len(result.classes)} classes",
        **({} if result.fit == "crop" else {"images": f"{result.fit}, padded to the largest of a batch"}),
        "top-1": f"{result.top1:.2f} %",
        "top-5": f"{result.top5:.2f} %",
        "loss": f"{result.loss:.4f}",
        "weakest classes": ", ".join(f"{name} {value:.1f} %" for name, value in result.worst_classes()),
        "speed": f"{result.images_per_second:,.0f} images/s with loading, {result.model_images_per_second:,.0f} "
        f"images/s of the model alone (batch {result.batch_size}, {result.precision}, {result.device})",
        "peak memory": f"{result.peak_memory_mib:,.0f} MiB",
    }


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files of images, or folders of them.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL)],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Number of classes to show for each image.")] = 5,
    batch_size: BatchSize = 16,
    device: Device = DeviceName.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with an entry for each image.")] = False,
) -> None:
    """Classify images.

    Images that cannot be read are named on the error stream, the others are classified, and the exit code is 1.
    """
    source = student_or_name(model, "classify")
    predictions = task.predict(images, source, top=top, batch_size=batch_size, device=device.value)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in predictions], indent=1))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("image", overflow="fold")
        table.add_column("class")
        table.add_column("probability", justify="right")
        for one in predictions:
            for rank, (name, probability) in enumerate(zip(one.classes, one.probabilities, strict=True)):
                image, style = ("", "dim") if rank else (escape(printable(one.image)), None)
                table.add_row(image, escape(printable(name)), f"{probability:.1%}", style=style)
        Console().print(table)
    broken = [one for one in predictions if one.broken is not None]
    for one in broken:
        warn(f"{one.image}: {one.broken}")
    if broken:
        raise typer.Exit(1)
