"""How a command fails: one line, and an exit code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from gspn.tasks.core.errors import MissingExtraError, UsageError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A request that cannot be met is one line and exit code 2; a missing package or file, exit code 1."""
    try:
        yield
    except UsageError as error:
        raise failed(str(error), 2) from None
    except MissingExtraError as error:
        raise failed(str(error), 1) from None
    except OSError as error:
        raise failed(f"{error.filename or 'a file'}: {error.strerror or error}.", 1) from None


def failed(message: str, code: int) -> typer.Exit:
    """What to raise after a line that says why."""
    if os.environ.get("RANK", "0") == "0":  # once, however many processes stop at it
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(code)


def warn(message: str) -> None:
    """A line to the error stream."""
    Console(stderr=True).print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)
