"""``gspn classify``: train, evaluate and apply classifiers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import failed, one_line_errors, warn
from .options import Device, DeviceName, Precision, PrecisionName
from .presets import given_config, print_preset, print_presets

if TYPE_CHECKING:
    from gspn.tasks.classify import Evaluation, Prediction

app = typer.Typer(
    help="Train, evaluate and apply image classifiers: the networks of gspn, and any of timm.", no_args_is_help=True
)


def _presets() -> list[str]:
    from gspn.tasks.classify import TrainConfig

    return TrainConfig.preset_names()


# --- train ------------------------------------------------------------------------------------------------------------


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Option(
            "--config", "-c", metavar="FILE|PRESET", autocompletion=_presets, help="A YAML file, or a preset's name."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="A key of the configuration, as optim.lr=1e-3. Repeatable."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="model.name, any that timm knows.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME", help="data.name: emoji, digits, mnist5k, folder, ...")
    ] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="data.root.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="run.output.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="schedule.epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="data.batch_size, of each process.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="RATE", help="optim.lr, for optim.lr_base_batch images.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="run.seed.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="data.workers.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output directory, if there is one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and stop.")] = False,
) -> None:
    """Train a classifier.

    Each option overrides --set, which overrides --config. Without --config, --resume takes the configuration of the
    run in --output. Starts in one process; for several GPUs start it with torchrun or accelerate launch.
    """
    from gspn.tasks.classify.config import TrainConfig
    from gspn.tasks.core.config import write_yaml

    flags = {
        "model.name": model,
        "data.name": data,
        "data.root": root,
        "run.output": output,
        "schedule.epochs": epochs,
        "data.batch_size": batch_size,
        "optim.lr": lr,
        "run.seed": seed,
        "data.workers": workers,
    }
    with one_line_errors():
        given = given_config(TrainConfig, config, set_, flags, resume=resume)
        if dry_run:
            typer.echo(write_yaml(given), nl=False)
            return
        from gspn.tasks.classify import train as run

        console = Console()
        try:
            result = run(given, resume=resume, console=console)
        except KeyboardInterrupt:
            raise failed(f"interrupted; continue with --resume --output {given.run.output}", 130) from None
        if result.is_main:
            console.print(
                f"best top-1 [bold]{result.best_score:.2f}[/] after epoch {result.best_epoch}: "
                f"{escape(str(result.output / 'best'))}",
                highlight=False,
                soft_wrap=True,
            )


@app.command()
def presets() -> None:
    """List the presets for --config."""
    from gspn.tasks.classify import TrainConfig

    print_presets(TrainConfig)


@app.command()
def preset(name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=_presets)]) -> None:
    """Print a preset's YAML, to start a file of your own from."""
    from gspn.tasks.classify import TrainConfig

    with one_line_errors():
        print_preset(TrainConfig, name)


# --- eval -------------------------------------------------------------------------------------------------------------


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run's directory, a timm name with weights, or hf-hub:OWNER/NAME.")
    ],
    data: Annotated[str, typer.Option(metavar="NAME", help="emoji, digits, mnist5k, folder, ...")],
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the data lie.")] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Of the data.")] = "val",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a forward pass.")] = 64,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Processes that load images.")] = 0,
    precision: Precision = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Images and weights in that layout.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Everything, also per class.")
    ] = None,
    confusion: Annotated[
        Path | None,
        typer.Option(metavar="PNG", dir_okay=False, help="Image of the confusion matrix; needs matplotlib."),
    ] = None,
) -> None:
    """Accuracy, confusions, speed and memory of a trained classifier."""
    with one_line_errors():
        from gspn.tasks.classify.confusion import check_image_path, save_confusion

        if confusion is not None:
            check_image_path(confusion)
        from gspn.tasks.classify import evaluate as run

        console = Console()
        found = run(
            model,
            data=data,
            root=root,
            split=split,
            batch_size=batch_size,
            workers=workers,
            precision=precision.value,
            device=device.value,
            channels_last=channels_last,
            console=console,
        )
        if not found.is_main:
            return
        console.print(_evaluation_table(found))
        for name in found.broken:
            warn(f"{name} could not be read and does not count")
        if json_path is not None:
            found.write_json(json_path)
            console.print(f"[dim]wrote[/] {escape(str(json_path))}", highlight=False, soft_wrap=True)
        if confusion is not None:
            save_confusion(found, confusion)
            console.print(f"[dim]wrote[/] {escape(str(confusion))}", highlight=False, soft_wrap=True)


def _evaluation_table(found: Evaluation) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("model", escape(f"{found.model}, {found.parameters / 1e6:.2f} M parameters"))
    table.add_row("data", escape(f"{found.data}/{found.split}, {found.images:,} images, {len(found.classes)} classes"))
    table.add_row("top-1", f"{found.top1:.2f} %")
    table.add_row("top-5", f"{found.top5:.2f} %")
    table.add_row("loss", f"{found.loss:.4f}")
    worst = ", ".join(f"{name} {value:.1f} %" for name, value in found.worst_classes())
    table.add_row("weakest classes", escape(worst))
    table.add_row(
        "speed",
        f"{found.images_per_second:,.0f} images/s with loading, {found.model_images_per_second:,.0f} images/s of the "
        f"network alone (batch {found.batch_size}, {found.precision}, {found.device})",
    )
    table.add_row("peak memory", f"{found.peak_memory_mib:,.0f} MiB")
    return table


# --- predict ----------------------------------------------------------------------------------------------------------


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="A run's directory, a timm name with weights, or hf-hub:OWNER/NAME."
        ),
    ],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Classes to show of each image.")] = 5,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a forward pass.")] = 16,
    device: Device = DeviceName.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with an entry for each image.")] = False,
) -> None:
    """Classify images. Those that cannot be read are named, the rest goes on, and the exit code is 1 then."""
    with one_line_errors():
        from gspn.tasks.classify import predict as run

        found = run(images, model, top=top, batch_size=batch_size, device=device.value)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        Console().print(_prediction_table([one for one in found if one.broken is None]))
    broken = [one for one in found if one.broken is not None]
    for one in broken:
        warn(f"{one.image}: {one.broken}")
    if broken:
        raise typer.Exit(1)


def _prediction_table(found: Sequence[Prediction]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for one in found:
        for place, (name, probability) in enumerate(zip(one.classes, one.probabilities, strict=True)):
            first = place == 0
            table.add_row(
                escape(one.image) if first else "", escape(name), f"{probability:.1%}", style=None if first else "dim"
            )
    return table
