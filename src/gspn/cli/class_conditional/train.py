"""``gspn class-conditional train``, ``presets`` and ``preset``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import failed, one_line_errors
from ..presets import given_config, print_preset, print_presets


def _presets() -> list[str]:
    from gspn.tasks.class_conditional import GenerateConfig

    return GenerateConfig.preset_names()


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
            "--set", "-s", metavar="KEY=VALUE", help="A key of the configuration, as optim.lr=1e-4. Repeatable."
        ),
    ] = None,
    network: Annotated[str | None, typer.Option(metavar="NAME", help="model.name: gspn, attention, dit.")] = None,
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="model.size, such as B/2.")] = None,
    data: Annotated[str | None, typer.Option(metavar="NAME", help="data.name: mnist5k, emoji, folder, ...")] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="data.root.")] = None,
    latents: Annotated[
        Path | None, typer.Option(metavar="DIR", help="data.latents, as gspn class-conditional latents wrote them.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="run.output.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="schedule.epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="data.batch_size, of each process.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="RATE", help="optim.lr.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="run.seed.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="data.workers.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output directory, if there is one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and stop.")] = False,
) -> None:
    """Train a class-conditional generative model.

    Each option overrides --set, which overrides --config. Without --config, --resume takes the configuration of the
    run in --output. Starts in one process; for several GPUs start it with torchrun or accelerate launch.
    """
    from gspn.tasks.class_conditional import GenerateConfig
    from gspn.tasks.core.config import write_yaml

    flags = {
        "model.name": network,
        "model.size": size,
        "data.name": data,
        "data.root": root,
        "data.latents": latents,
        "run.output": output,
        "schedule.epochs": epochs,
        "data.batch_size": batch_size,
        "optim.lr": lr,
        "run.seed": seed,
        "data.workers": workers,
    }
    with one_line_errors():
        given = given_config(GenerateConfig, config, set_, flags, resume=resume)
        if dry_run:
            typer.echo(write_yaml(given), nl=False)
            return
        from gspn.tasks.class_conditional import train as run

        console = Console()
        try:
            result = run(given, resume=resume, console=console)
        except KeyboardInterrupt:
            raise failed(f"interrupted; continue with --resume --output {given.run.output}", 130) from None
        if result.is_main:
            console.print(
                f"[dim]wrote[/] {escape(str(result.output / 'last'))}; draw with "
                f"[bold]gspn class-conditional sample {escape(str(result.output))}[/]",
                highlight=False,
                soft_wrap=True,
            )


def presets() -> None:
    """List the presets for --config."""
    from gspn.tasks.class_conditional import GenerateConfig

    print_presets(GenerateConfig)


def preset(name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=_presets)]) -> None:
    """Print a preset's YAML, to start a file of your own from."""
    from gspn.tasks.class_conditional import GenerateConfig

    with one_line_errors():
        print_preset(GenerateConfig, name)
