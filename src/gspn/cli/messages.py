"""Messages of commands: files that were written, warnings and errors; and their tables."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from gspn._console import Console
from gspn._errors import MissingExtraError, ProcessLostError, UsageError
from gspn._files import printable

_SHOWN = 5
_WrongArguments: Any = typer.BadParameter.__base__  # click's UsageError: typer has its own click in recent versions


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn every error but a bug into one line: exit code 2 for a wrong request, 1 for packages, files and memory."""
    try:
        yield
    except UsageError as error:
        raise failed(str(error), 2) from None
    except _WrongArguments as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        help_ = f" See {error.ctx.command_path} --help." if error.ctx is not None else ""
        raise failed(f"{error.format_message().rstrip('.')}.{help_}", 2) from None
    except MissingExtraError as error:
        raise failed(str(error)) from None
    except ProcessLostError as error:
        _print_line("[bold red]error:[/]", str(error))  # on every process: the first may be the one that is lost
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever reads the output has stopped, as `head` does
            raise
        reason = error.strerror or str(error) or type(error).__name__
        where = error.filename if isinstance(error.filename, str | bytes) else None
        raise failed(f"{os.fsdecode(where)}: {reason}." if where else f"{reason}.") from None
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no class of its own for the memory of the CPU.
        no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not no_memory and not re.search("DefaultCPUAllocator|Storage size calculation overflowed", str(error)):
            raise
        raise failed(f"out of memory: {str(error) or 'no memory is left'}. Use smaller sizes or batches.") from None


def failed(message: str, code: int = 1) -> typer.Exit:
    """Print an error in one line; raise the exit that is returned."""
    if os.environ.get("RANK", "0") == "0":  # once, however many processes stop at it
        _print_line("[bold red]error:[/]", message)
    return typer.Exit(code)


def warn(message: str) -> None:
    """Print a warning to the error stream, in one line."""
    _print_line("[yellow]warning:[/]", message)


def warn_broken(names: Sequence[str]) -> None:
    """Warn of the images that do not count because they could not be read; the first five are named."""
    if names:
        more = f"; and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        shown = "; ".join(map(printable, names[:_SHOWN]))
        warn(f"{len(names):,} images could not be read and do not count: {shown}{more}")


def _print_line(start: str, message: str) -> None:
    line = printable(re.sub(r"\s*\n\s*", " ", message.strip()))
    Console(stderr=True).print(f"{start} {escape(line)}", highlight=False, soft_wrap=True)


def wrote(what: str | Path, rest: str = "") -> None:
    """Say which file or directory was written; ``rest`` may contain rich's markup."""
    Console().print(f"[dim]wrote[/] {escape(printable(what))}{rest}", highlight=False, soft_wrap=True)


def facts_table(facts: Mapping[str, str]) -> Table:
    """A table with a fact in each row: its name and its text, in which rich's markup is escaped."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(escape(name), escape(text))
    return table


def titled_table(title: str, texts: Sequence[str], numbers: Sequence[str] = (), **options: Any) -> Table:
    """A table with a title, columns of text, and columns of numbers, which are aligned to the right."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", caption_justify="left", **options)
    for heading in (*texts, *numbers):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    return table
