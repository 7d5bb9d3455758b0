"""``gspn t2i train``, ``distill``, ``autoencoder``, ``presets`` and ``preset``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gspn.tasks.core.errors import UsageError
from gspn.tasks.core.sections import Configuration

from ..errors import failed, one_line_errors
from ..presets import given_config, print_preset, print_presets

Config = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE|PRESET", help="A YAML file, or a preset's name.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A key of the configuration, as optim.lr=1e-4. Repeatable."),
]
Data = Annotated[str | None, typer.Option(metavar="NAME", help="data.name: emoji, folder, wds, hfds/NAME.")]
Root = Annotated[Path | None, typer.Option(metavar="DIR", help="data.root.")]
Size = Annotated[int | None, typer.Option(metavar="N", help="data.size: height and width of the images.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="run.output.")]
Epochs = Annotated[int | None, typer.Option(metavar="N", help="schedule.epochs.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="data.batch_size, of each process.")]
Rate = Annotated[float | None, typer.Option(metavar="RATE", help="optim.lr.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="run.seed.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="data.workers.")]
Cache = Annotated[
    Path | None, typer.Option(metavar="DIR", help="data.cache: where latents and encoded captions are kept.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output directory, if there is one.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the configuration and stop.")]


def train(
    config: Config = None,
    set_: Set = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="PATH|HUB_ID", help="model.pipeline: whose UNet is trained further.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(metavar="PATH|HUB_ID", help="model.vae: an autoencoder, to start from nothing.")
    ] = None,
    data: Data = None,
    root: Root = None,
    size: Size = None,
    cache: Cache = None,
    output: Output = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Seed = None,
    workers: Workers = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train a text-to-image UNet with self-attention: a teacher.

    Each option overrides --set, which overrides --config. Without --config, --resume takes the configuration of the
    run in --output. Starts in one process; for several GPUs start it with torchrun or accelerate launch.
    """
    from gspn.tasks.text_to_image.train import TextToImageConfig

    flags = _shared(data, root, size, cache, output, epochs, batch_size, lr, seed, workers)
    flags |= {"model.pipeline": pipeline, "model.vae": vae}
    _start(TextToImageConfig, "train", config, set_, flags, resume, dry_run, "gspn t2i sample PROMPT --model {}")


def distill(
    config: Config = None,
    set_: Set = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="PATH|HUB_ID|NAME", help="teacher: a text-to-image pipeline.")
    ] = None,
    data: Data = None,
    root: Root = None,
    size: Size = None,
    cache: Cache = None,
    output: Output = None,
    epochs: Epochs = None,
    block_epochs: Annotated[
        int | None, typer.Option(metavar="N", help="distillation.block_epochs: layer by layer first.")
    ] = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Seed = None,
    workers: Workers = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train an adapter, GSPN in the place of a pipeline's self-attention, to draw as the pipeline does.

    Each option overrides --set, which overrides --config. Without --config, --resume takes the configuration of the
    run in --output. Starts in one process; for several GPUs start it with torchrun or accelerate launch.
    """
    from gspn.tasks.text_to_image.distill import DistillConfig

    flags = _shared(data, root, size, cache, output, epochs, batch_size, lr, seed, workers)
    flags |= {"teacher": teacher, "distillation.block_epochs": block_epochs}
    then = "gspn t2i sample PROMPT --model TEACHER --adapter {}"
    _start(DistillConfig, "distill", config, set_, flags, resume, dry_run, then)


def autoencoder(
    config: Config = None,
    set_: Set = None,
    data: Annotated[str | None, typer.Option(metavar="NAME", help="data.name: emoji, mnist5k, folder, ...")] = None,
    root: Root = None,
    size: Size = None,
    output: Output = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Seed = None,
    workers: Workers = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train an autoencoder of images, for gspn t2i train --vae and gspn class-conditional latents.

    Without a perceptual or adversarial loss: for photographs take a published one.
    """
    from gspn.tasks.autoencode import AutoencodeConfig

    flags = _shared(data, root, size, None, output, epochs, batch_size, lr, seed, workers)
    del flags["data.cache"]
    _start(AutoencodeConfig, "autoencoder", config, set_, flags, resume, dry_run, "gspn t2i train --vae {}")


def _shared(
    data: str | None,
    root: Path | None,
    size: int | None,
    cache: Path | None,
    output: Path | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int | None,
    workers: int | None,
) -> dict[str, Any]:
    return {
        "data.name": data,
        "data.root": root,
        "data.size": size,
        "data.cache": cache,
        "run.output": output,
        "schedule.epochs": epochs,
        "data.batch_size": batch_size,
        "optim.lr": lr,
        "run.seed": seed,
        "data.workers": workers,
    }


def _start(
    kind: type[Any],
    name: str,
    config: str | None,
    overrides: list[str] | None,
    flags: dict[str, Any],
    resume: bool,
    dry_run: bool,
    then: str,
) -> None:
    from gspn.tasks.core.config import write_yaml

    with one_line_errors():
        given = given_config(kind, config, overrides, flags, resume=resume)
        if dry_run:
            typer.echo(write_yaml(given), nl=False)
            return
        from gspn.tasks import autoencode
        from gspn.tasks.text_to_image import distill, train

        start = {"train": train.train, "distill": distill.distill}.get(name, autoencode.train)
        console = Console()
        try:
            result = start(given, resume=resume, console=console)
        except KeyboardInterrupt:
            raise failed(f"interrupted; continue with --resume --output {given.run.output}", 130) from None
        if result.is_main:
            last = escape(str(result.output / "last"))
            console.print(f"[dim]wrote[/] {last}; next: [bold]{then.format(last)}[/]", highlight=False, soft_wrap=True)


def _kinds() -> dict[str, type[Configuration]]:
    from gspn.tasks.autoencode import AutoencodeConfig
    from gspn.tasks.text_to_image.distill import DistillConfig
    from gspn.tasks.text_to_image.train import TextToImageConfig

    return {"autoencoder": AutoencodeConfig, "train": TextToImageConfig, "distill": DistillConfig}


def presets() -> None:
    """List the presets for --config, by command."""
    for name, kind in _kinds().items():
        Console().print(f"[dim]gspn t2i {name}[/]", highlight=False)
        print_presets(kind)


def preset(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="autoencoder, train or distill.")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
) -> None:
    """Print a preset's YAML, to start a file of your own from."""
    with one_line_errors():
        kinds = _kinds()
        if command not in kinds:
            raise UsageError(f"{command!r} has no presets; name one of {', '.join(kinds)}.")
        print_preset(kinds[command], name)
