"""Options that commands share, and how their values are read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gspn._errors import UsageError, require
from gspn._files import check_writable
from gspn.data.registry import help_text


def writable(path: Path | None) -> Path | None:
    """A callback of options that name an output: it is found out before the work whether it can be written."""
    if path is not None:
        check_writable(path)
    return path


def output_file(*names: str, metavar: str, help: str) -> Any:  # noqa: A002  (typer's word)
    """An option that names a file to write."""
    return typer.Option(*names, metavar=metavar, dir_okay=False, callback=writable, help=help)


def output_directory(help: str, *names: str) -> Any:  # noqa: A002
    """An option that names a directory to write to; ``--output`` unless it has other names."""
    names = names or ("--output", "-o")
    return typer.Option(*names, metavar="DIR", file_okay=False, callback=writable, help=help)


def figure_file(*names: str, help: str, endings: tuple[str, ...] = (".png",)) -> Any:  # noqa: A002
    """An option that names a figure to write, which needs matplotlib."""

    def check(path: Path | None) -> Path | None:
        if path is not None:
            require("matplotlib", extra="plot")
            if path.suffix.lower() not in endings:
                raise typer.BadParameter(f"{str(path)!r} does not end in {' or '.join(endings)}.")
        return writable(path)

    return typer.Option(*names, metavar="PNG", dir_okay=False, callback=check, help=f"{help}; needs matplotlib.")


class PrecisionName(StrEnum):
    """The precision of the computation."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class DeviceName(StrEnum):
    """The device of the computation."""

    auto = "auto"
    cpu = "cpu"


MOST_IMAGES = 10_000_000  # of one call: their records are in memory

Precision = Annotated[PrecisionName, typer.Option(help="Precision of the computation; bf16 and fp16 use autocast.")]
Device = Annotated[DeviceName, typer.Option(help="Device; auto takes a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Images in one forward pass.")]
Workers = Annotated[int, typer.Option(metavar="N", min=0, max=1024, help="Number of processes that load images.")]
Root = Annotated[Path | None, typer.Option(metavar="DIR", help="Directory of the data set, for those that need one.")]
ImageData = Annotated[str, typer.Option(metavar="NAME", help=f"Name of the data set: {help_text('labelled')}.")]
OutputDirectory = Annotated[Path, output_directory("Directory to write to.")]
Results = Annotated[Path | None, output_directory("Directory to write the results to, as JSON.")]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="WIDTHxHEIGHT", help="Size of the images in pixels, such as 640x480, or one number for a square. "
        "Default: the size of the training."
    ),
]  # fmt: skip


def parse_size(text: str) -> tuple[int, int]:
    """The width and the height of ``WIDTHxHEIGHT``, or of one number for a square.

    Raises:
        UsageError: the text is not a size, or not one whose images could be held in memory.

    Example:
        >>> parse_size("640x480"), parse_size("64")
        ((640, 480), (64, 64))
    """
    width, by, height = text.lower().partition("x")
    sides = [width, height if by else width]
    if not all(side.isascii() and side.isdecimal() and len(side) < 20 and int(side) for side in sides):
        raise UsageError(f"--size {text!r} is not a size; give WIDTHxHEIGHT, such as 640x480, or one side, such as 64.")
    from gspn.bench.environment import free_memory

    size = int(sides[0]), int(sides[1])
    needed, free = 12 * size[0] * size[1], free_memory(torch.device("cpu"))  # three channels in float32
    if needed > (2**40 if free is None else free):
        raise UsageError(
            f"--size {text}: one image alone takes {needed / 2**30:,.1f} GiB, more than is free; give a smaller size."
        )
    return size
