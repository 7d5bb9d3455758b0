"""``gspn classify``: train, evaluate and apply classifiers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspn.tasks.errors import MissingExtraError, UsageError

app = typer.Typer(
    help="Train, evaluate and apply image classifiers: the networks of gspn, and any of timm.", no_args_is_help=True
)

_TASKS = "gspn.tasks.classify"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A request that cannot be met is one line and exit code 2; a missing package or file, exit code 1."""
    try:
        yield
    except UsageError as error:
        raise _failed(str(error), 2) from None
    except MissingExtraError as error:
        raise _failed(str(error), 1) from None
    except OSError as error:
        raise _failed(f"{error.filename or 'a file'}: {error.strerror or error}.", 1) from None


def _failed(message: str, code: int) -> typer.Exit:
    if os.environ.get("RANK", "0") == "0":  # once, however many processes stop at it
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(code)


def _recipes() -> list[str]:
    from gspn.tasks.classify.recipes import recipe_names

    return recipe_names()


# --- train ------------------------------------------------------------------------------------------------------------


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Option(
            "--config", "-c", metavar="FILE|RECIPE", autocompletion=_recipes, help="A YAML file, or a recipe's name."
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
    from gspn.tasks.classify.config import TrainConfig, load_config
    from gspn.tasks.configs import write_yaml

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
    with _one_line_errors():
        if config is not None:
            base = load_config(config)
        elif resume and output is not None and (output / "config.yaml").is_file():
            base = load_config(output / "config.yaml")
        else:
            base = TrainConfig()
        given = base.changed(*(set_ or []), **{key: value for key, value in flags.items() if value is not None})
        if dry_run:
            typer.echo(write_yaml(given), nl=False)
            return
        from gspn.tasks.classify import train as run

        console = Console()
        try:
            result = run(given, resume=resume, console=console)
        except KeyboardInterrupt:
            raise _failed(f"interrupted; continue with --resume --output {given.run.output}", 130) from None
        if result.is_main:
            console.print(
                f"best top-1 [bold]{result.best_top1:.2f}[/] after epoch {result.best_epoch}: "
                f"{escape(str(result.output / 'best'))}",
                highlight=False,
                soft_wrap=True,
            )


@app.command()
def recipes() -> None:
    """List the recipes for --config."""
    from gspn.tasks.classify.recipes import recipe_names, recipe_title

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name in recipe_names():
        table.add_row(name, escape(recipe_title(name)))
    Console().print(table)


@app.command()
def recipe(name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=_recipes)]) -> None:
    """Print a recipe's YAML, to start a file of your own from."""
    from gspn.tasks.classify.recipes import recipe_text

    with _one_line_errors():
        typer.echo(recipe_text(name), nl=False)
