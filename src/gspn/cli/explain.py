"""``gspn explain``: what one pixel of an image takes from the rest, inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from gspn._console import Console
from gspn._errors import UsageError, require

from .messages import failed, titled_table, wrote
from .options import figure_file, output_file

if TYPE_CHECKING:
    from torch import Tensor

    from gspn.analysis.stability import ScanStability

_DRAWN_SIDE = 1280  # the figure shows no more pixels


def explain(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A photograph: JPEG, PNG, WebP, ...")],
    point: Annotated[
        str | None, typer.Option("--point", metavar="X,Y", help="The pixel to explain. Default: the centre.")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Name of a model of gspn, or a folder that timm or gspn saved.")
    ] = "gspn_pico",
    stage: Annotated[
        int, typer.Option(metavar="N", help="Number of the stage, from 0, or from the end if negative.")
    ] = -1,
    block: Annotated[
        int, typer.Option(metavar="N", help="Number of the block in the stage, from 0, or from the end if negative.")
    ] = -1,
    size: Annotated[
        int, typer.Option(metavar="N", min=1, max=16384, help="Longer side of the model's input in pixels.")
    ] = 448,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of random weights, if none are pretrained.")] = 0,
    output: Annotated[Path | None, figure_file("--output", "-o", help="Image to write")] = None,
    report: Annotated[Path | None, output_file(metavar="CSV", help="Table of the scans' stability to write.")] = None,
) -> None:
    """Draw what one pixel of an image takes from the rest of it, and check the stability of every scan.

    The scans amount to a matrix over pixels, and the affinity is one row of it, from one vector-Jacobian product a
    direction: the mean magnitude over the channels, for all directions together and for each alone.

    The table has, for each scan, the sum of a pixel's taps (1), the largest state, its ratio to the largest input, and
    whether float16 can hold it. The exit code is 1 if a scan leaves the bound of the theory.
    """
    import torch

    console = Console()
    require("PIL", "timm")
    pixels = _load(image)
    height, width = pixels.shape[1:]
    where = (width // 2, height // 2) if point is None else _point(point, width, height)

    from gspn.analysis.explain import explain as run
    from gspn.analysis.loading import load_model

    opened = load_model(model, seed=seed)
    if opened.weights.startswith("random"):
        console.print(
            f"[yellow]{escape(opened.name)} has no pretrained weights; these are {opened.weights}.[/] "
            "The maps show how information can spread, not what a trained model does with it.",
            highlight=False,
        )
    with torch.no_grad():
        explanation = run(opened, pixels, where, size=size, stage=stage, block=block)

    console.print(_table(explanation.stability, explanation.affinity.name, f"{opened.name} on {image.name}"))
    if output is not None:
        from gspn._figures import save_figure
        from gspn.analysis.drawing import draw_explanation

        save_figure(draw_explanation(explanation, _at_most(pixels, _DRAWN_SIDE)), output)
        wrote(output)
    if report is not None:
        from gspn.analysis.stability import write_stability

        write_stability(report, explanation.stability)
        wrote(report)
    if not all(entry.ok for entry in explanation.stability):
        raise failed("not every scan keeps its bound; see the table.")


def _load(path: Path) -> Tensor:
    """The image as ``[3, H, W]`` in 0 to 1."""
    import torch

    from gspn.data import load_image

    image = load_image(path)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def _at_most(image: Tensor, side: int) -> Tensor:
    from torch.nn.functional import interpolate

    height, width = image.shape[1:]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _point(text: str, width: int, height: int) -> tuple[int, int]:
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--point {text!r} is not X,Y, as in 320,240.") from None
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"--point {text!r} lies outside the image of {width} x {height} pixels.")
    return x, y


def _table(report: Sequence[ScanStability], shown: str, title: str) -> Table:
    numbers = ("tap sum", "max |h|", "growth", "float16")
    table = titled_table(f"scans of {title}", ["block", "direction"], numbers, box=box.SIMPLE_HEAD, pad_edge=False)
    for _, group in groupby(report, key=lambda entry: entry.module):
        entries = list(group)
        for lead, entry in zip(_lead(entries, shown), entries, strict=True):
            low, high = f"{entry.tap_sum_min:.5f}", f"{entry.tap_sum_max:.5f}"
            table.add_row(
                lead, entry.direction, low if low == high else f"{low}..{high}", f"{entry.state_max:.3g}",
                f"{entry.growth:.1f}x", "finite" if entry.float16_finite else "[yellow]overflows[/]",
                style=None if entry.ok else "bold red",
            )  # fmt: skip
        table.add_section()
    return table


def _lead(entries: Sequence[ScanStability], shown: str) -> list[str]:
    """The first column of a module's rows, one for each direction."""
    first = entries[0]
    name = escape(first.module.removesuffix(".mixer.gspn"))
    lines = [
        f"[bold]{name}[/]" if first.module == shown else name,
        f"[dim]{first.channels} x {first.height} x {first.width}[/]",
        "[dim]global[/]" if first.segment is None else f"[dim]segments of {first.segment}[/]",
    ]
    return [*lines, *[""] * len(entries)][: len(entries)]
