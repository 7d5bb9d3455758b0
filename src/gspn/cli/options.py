"""Options that commands share, and how their values are read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gspn._errors import UsageError
from gspn.data.registry import help_text


class PrecisionName(StrEnum):
    """The precision of the computation."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class DeviceName(StrEnum):
    """The device of the computation."""

    auto = "auto"
    cpu = "cpu"


Precision = Annotated[PrecisionName, typer.Option(help="Precision of the computation; bf16 and fp16 use autocast.")]
Device = Annotated[DeviceName, typer.Option(help="Device; auto takes a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Images in one forward pass.")]
Workers = Annotated[int, typer.Option(metavar="N", min=0, help="Number of processes that load images.")]
Root = Annotated[Path | None, typer.Option(metavar="DIR", help="Directory of the data set, for those that need one.")]
ImageData = Annotated[str, typer.Option(metavar="NAME", help=f"Name of the data set: {help_text('labelled')}.")]
OutputDirectory = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write to.")]
Results = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Directory to write the results to, as JSON.")
]
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
        UsageError: the text is not a size.

    Example:
        >>> parse_size("640x480"), parse_size("64")
        ((640, 480), (64, 64))
    """
    width, by, height = text.lower().partition("x")
    sides = [width, height if by else width]
    if not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--size {text!r} is not a size; give WIDTHxHEIGHT, such as 640x480, or one side, such as 64.")
    return int(sides[0]), int(sides[1])
