"""The presets of a task on the command line, and a configuration from a preset, a file and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspn.tasks.core.sections import Configuration

C = TypeVar("C", bound=Configuration)


def print_presets(kind: type[Configuration]) -> None:
    """The names of the presets and what they are."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name in kind.preset_names():
        table.add_row(name, escape(kind.preset_title(name)))
    Console().print(table)


def print_preset(kind: type[Configuration], name: str) -> None:
    """A preset's YAML."""
    typer.echo(kind.preset_text(name), nl=False)


def given_config(
    kind: type[C], config: str | None, overrides: list[str] | None, flags: dict[str, Any], *, resume: bool
) -> C:
    """The configuration that a command line asks for.

    Args:
        kind: The task's configuration.
        config: A file or a preset; without one, what a run to be resumed has, or the defaults.
        overrides: Each ``section.key=value``.
        flags: Options by their key; None where they were not given.
        resume: Whether the run in the output directory is to be continued.

    Raises:
        UsageError: it is not right.
    """
    output: Path | None = flags.get("run.output")
    if config is not None:
        base = kind.load(config)
    elif resume and output is not None and (output / "config.yaml").is_file():
        base = kind.load(output / "config.yaml")
    else:
        base = kind()
    return base.changed(*(overrides or []), **{key: value for key, value in flags.items() if value is not None})
