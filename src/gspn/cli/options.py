"""Options that commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


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
