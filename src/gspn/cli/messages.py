"""Messages of commands: files that were written, warnings and errors; and their tables."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspn._errors import MissingExtraError, UsageError
from gspn._files import printable


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors into one line: exit code 2 for a wrong request, 1 for a missing package or file."""
    try:
        with _one_line_warnings():
            yield
    except UsageError as error:
        raise failed(str(error), 2) from None
    except MissingExtraError as error:
        raise failed(str(error)) from None
    except OSError as error:
        raise failed(f"{error.filename or 'a file'}: {error.strerror or error}.") from None


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print each warning of this package once and in one line, from the first process only."""
    with warnings.catch_warnings():
        shown, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not category.__module__.startswith("gspn."):
                shown(message, category, *where, **more)
            elif os.environ.get("RANK", "0") == "0" and str(message) not in said:
                said.add(str(message))
                warn(str(message))

        warnings.showwarning = show
        yield


def failed(message: str, code: int = 1) -> typer.Exit:
    """Print an error; raise the exit that is returned."""
    if os.environ.get("RANK", "0") == "0":  # once, however many processes stop at it
        Console(stderr=True).print(f"[bold red]error:[/] {escape(printable(message))}", highlight=False, soft_wrap=True)
    return typer.Exit(code)


def warn(message: str) -> None:
    """Print a warning to the error stream."""
    Console(stderr=True).print(f"[yellow]warning:[/] {escape(printable(message))}", highlight=False, soft_wrap=True)


def wrote(what: str | Path, rest: str = "") -> None:
    """Say which file or directory was written; ``rest`` may contain rich's markup."""
    Console().print(f"[dim]wrote[/] {escape(printable(what))}{rest}", highlight=False, soft_wrap=True)


def facts_table(facts: Mapping[str, str]) -> Table:
    """A table with a fact in each row: its name and its text, in which rich's markup is escaped."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(printable(name), escape("\n".join(map(printable, text.split("\n")))))
    return table


def titled_table(title: str, texts: Sequence[str], numbers: Sequence[str] = (), **options: Any) -> Table:
    """A table with a title, columns of text, and columns of numbers, which are aligned to the right."""
    table = Table(
        title=escape(printable(title)), title_justify="left", title_style="bold", caption_justify="left", **options
    )
    for heading in (*texts, *numbers):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    return table
