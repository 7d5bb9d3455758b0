"""The commands of a task that trains: ``train``, ``presets`` and ``preset``, made from its configuration class."""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from gspn._console import Console
from gspn._errors import UsageError
from gspn.data.registry import help_text
from gspn.tasks.core.config import write_yaml
from gspn.tasks.core.sections import Configuration

from .messages import facts_table, failed

_HOW = """

Each option overrides --set, which overrides --config. Without --config, --resume takes the configuration of the run in
--output. The command starts one process; for several GPUs start it with torchrun or accelerate launch."""


@dataclass(frozen=True)
class Flag:
    """An option that is short for a key of the configuration; its type is that of the key."""

    key: str
    metavar: str
    help: str


FLAGS = {
    "data": Flag("data.name", "NAME", f"Name of the data set: {help_text('labelled')}."),
    "root": Flag("data.root", "DIR", "Directory of the data set, for those that need one."),
    "size": Flag("data.size", "N", "Height and width of the images in pixels."),
    "output": Flag("run.output", "DIR", "Directory of the run."),
    "epochs": Flag("schedule.epochs", "N", "Number of epochs."),
    "batch_size": Flag("data.batch_size", "N", "Images in a forward pass of each process."),
    "lr": Flag("optim.lr", "RATE", "Learning rate."),
    "seed": Flag("run.seed", "N", "Seed of all random numbers."),
    "workers": Flag("data.workers", "N", "Number of processes that load images, for each training process."),
}
"""The options of every training command."""


@dataclass(frozen=True)
class TrainingCommand:
    """One command that trains.

    Args:
        config: The class of its configuration.
        run: ``(config, resume=..., console=...)`` to the result; imports what it needs when it is called.
        help: The command's help.
        done: The line to print about a result; rich's markup.
        flags: Options beside :data:`FLAGS`, or in place of one.
        name: The command's name.
    """

    config: type[Configuration]
    run: Callable[..., Any]
    help: str
    done: Callable[[Any], str]
    flags: Mapping[str, Flag] = field(default_factory=dict)
    name: str = "train"


def add_training_commands(app: typer.Typer, *commands: TrainingCommand) -> None:
    """Add the commands that train, and ``presets`` and ``preset`` for the presets of their configurations."""
    for command in commands:
        app.command(command.name, help=command.help + _HOW)(_training_function(command))

    def presets() -> None:
        for command in commands:
            if len(commands) > 1:
                Console().print(f"[dim]{command.name}[/]", highlight=False)
            config = command.config
            Console().print(facts_table({name: config.preset_title(name) for name in config.preset_names()}))

    def print_preset(config: type[Configuration], name: str) -> None:
        typer.echo(config.preset_text(name), nl=False)

    def preset_of_one(
        name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=commands[0].config.preset_names)],
    ) -> None:
        print_preset(commands[0].config, name)

    def preset_of_several(
        command: Annotated[str, typer.Argument(metavar="COMMAND", help=", ".join(one.name for one in commands))],
        name: Annotated[str, typer.Argument(metavar="NAME")],
    ) -> None:
        configs = {one.name: one.config for one in commands}
        if command not in configs:
            raise UsageError(f"{command!r} has no presets; name one of {', '.join(configs)}.")
        print_preset(configs[command], name)

    app.command("presets", help="List the presets for --config.")(presets)
    preset = preset_of_one if len(commands) == 1 else preset_of_several
    app.command("preset", help="Print a preset as YAML, to start a file of your own from.")(preset)


def _training_function(command: TrainingCommand) -> Callable[..., None]:
    """The function that typer makes the command from: one parameter for each option."""
    flags = {**FLAGS, **command.flags}
    presets = command.config.preset_names
    options: dict[str, tuple[Any, typer.models.OptionInfo]] = {
        "config": (str, typer.Option(
            "--config", "-c", metavar="FILE|PRESET", autocompletion=presets, help="A YAML file, or a preset's name."
        )),
        "set_": (list[str], typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="A key of the configuration, such as optim.lr=1e-3. Repeatable."
        )),
        **{name: (_type_of(command.config, flag.key), _option(name, flag)) for name, flag in flags.items()},
        "resume": (bool, typer.Option("--resume", help="Continue the run in the output directory, if there is one.")),
        "dry_run": (bool, typer.Option("--dry-run", help="Print the configuration and stop.")),
    }  # fmt: skip

    def function(*, config: str | None, set_: list[str] | None, resume: bool, dry_run: bool, **values: Any) -> None:
        keys = {flags[name].key: value for name, value in values.items() if value is not None}
        base: Any = _configuration(command.config, config, keys.get("run.output"), resume)
        chosen = base.changed(*(set_ or []), **keys)
        if dry_run:
            typer.echo(write_yaml(chosen), nl=False)
            return
        console = Console()
        try:
            result = command.run(chosen, resume=resume, console=console)
        except KeyboardInterrupt:
            raise failed(f"interrupted; continue with --resume --output {chosen.run.output}", 130) from None
        if result.is_main:
            console.print(command.done(result), highlight=False, soft_wrap=True)

    parameters = []
    for name, (kind, option) in options.items():
        default, hint = (False, bool) if kind is bool else (None, kind | None)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])
        )
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _configuration(kind: type[Configuration], source: str | None, output: Path | None, resume: bool) -> Configuration:
    """The configuration of a file or preset, else of the run to resume, else the defaults."""
    if source is not None:
        return kind.load(source)
    if resume and output is not None and (output / "config.yaml").is_file():
        return kind.load(output / "config.yaml")
    return kind()


def _option(name: str, flag: Flag) -> typer.models.OptionInfo:
    spellings = ["--output", "-o"] if name == "output" else [f"--{name.replace('_', '-')}"]
    return typer.Option(*spellings, metavar=flag.metavar, help=f"{flag.help} Sets {flag.key}.")


def _type_of(config: type, key: str) -> type:
    """The type of a dotted key on the command line: int, float, Path or str."""
    hint: Any = config
    for name in key.split("."):
        hint = typing.get_type_hints(hint)[name]
    kinds = [hint, *typing.get_args(hint)]
    return next((kind for kind in (Path, float, int) if kind in kinds), str)
