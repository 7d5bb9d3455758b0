"""What the commands of ``gspn bench`` share: options, their checks, and messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gspn.bench import environment, report

if TYPE_CHECKING:
    from gspn.bench.accuracy_check import Figure

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def one_of(choices: Sequence[str]) -> Callable[[str | list[str] | None], str | list[str] | None]:
    """An option's callback that refuses a value outside ``choices``, showing both."""

    def check(value: str | list[str] | None) -> str | list[str] | None:
        for one in [value] if isinstance(value, str) else value or []:
            if one not in choices:
                raise typer.BadParameter(f"{one!r} is not one of {', '.join(choices)}.")
        # A repeated value would be timed against itself.
        return list(dict.fromkeys(value)) if isinstance(value, list) else value

    return check


def at_least(least: float) -> Callable[[float | None], float | None]:
    """An option's callback that refuses a number below ``least``, showing both."""

    def check(value: float | None) -> float | None:
        if value is not None and not value >= least:  # also refuses nan
            raise typer.BadParameter(f"{value} is below {least}.")
        return value

    return check


def each_at_least(least: int) -> Callable[[list[int] | None], list[int] | None]:
    """The same for a repeatable option, whose values come back sorted and once each."""

    def check(value: list[int] | None) -> list[int] | None:
        for one in value or []:
            if one < least:
                raise typer.BadParameter(f"{one} is below {least}.")
        return sorted(set(value)) if value else value

    return check


def choice(name: str, metavar: str, choices: Sequence[str], text: str) -> typer.models.OptionInfo:
    """An option with a few values."""
    return typer.Option(
        name,
        callback=one_of(choices),
        metavar=metavar,
        autocompletion=lambda: list(choices),
        help=f"{', '.join(choices)}. {text}",
    )


def count(text: str) -> typer.models.OptionInfo:
    """An option that is a number of at least 1."""
    return typer.Option(metavar="N", callback=at_least(1), help=text)


Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N. Default: cuda if there is one, else cpu.")
]
Threads = Annotated[int | None, count("CPU threads. Default: PyTorch's.")]
MinTime = Annotated[
    float, typer.Option(metavar="SECONDS", callback=at_least(0), help="Least time that the samples of each add up to.")
]
Csv = Annotated[Path | None, typer.Option(metavar="CSV", dir_okay=False, help="Table to write.")]
Png = Annotated[Path | None, typer.Option(metavar="PNG", dir_okay=False, help="Image to write; needs matplotlib.")]


def device_named(name: str | None) -> torch.device:
    """The device asked for, or CUDA if there is one.

    Raises:
        typer.BadParameter: it is no device that can be timed here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is not a device; use cpu, cuda or cuda:N.", param_hint="--device") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: times are taken on cpu and cuda devices.", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"{name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here.", param_hint="--device"
        )
    return device


def check_plot(path: Path) -> None:
    """Refuse an image that could not be written, before anything is timed."""
    try:
        report.require_matplotlib()
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--plot") from None
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{str(path)!r} does not end in .png.", param_hint="--plot")


def require_timm() -> None:
    """Exit with the line that installs timm where it is missing."""
    try:
        import timm  # noqa: F401
    except ImportError:
        raise failed('this needs timm; pip install "gspn[train]".') from None


def failed(message: str) -> typer.Exit:
    """Show an error; what is returned is to be raised."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


def wrote(console: Console, path: Path) -> None:
    """Say which file was written."""
    console.print(f"[dim]wrote[/] {escape(str(path))}", highlight=False, soft_wrap=True)


def progress_bar() -> Progress:
    """A bar on standard error that vanishes when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def hardware(here: environment.Environment) -> str:
    """The machine in a few words."""
    return f"{here.device}, {here.threads} CPU threads"


def red_figures(red: Mapping[str, Sequence[Figure]]) -> str:
    """What failed its check, by how much."""
    return "; ".join(
        f"{name}: {f.name} is off by {f.error:.3g}, and {f.bound:.3g} is accepted"
        for name, figures in red.items()
        for f in figures
        if not f.ok
    )
