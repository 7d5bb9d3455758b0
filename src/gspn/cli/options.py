"""Options that commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from gspn.tasks.core.errors import UsageError


class PrecisionName(StrEnum):
    """What numbers are computed in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class DeviceName(StrEnum):
    """Where."""

    auto = "auto"
    cpu = "cpu"


Precision = Annotated[PrecisionName, typer.Option(help="bf16 and fp16 use autocast.")]
Device = Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one.")]


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
