"""``gspn explain``: what one point of an image takes from the rest, inside a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from gspn.analysis.stability import ScanStability

DEFAULT_MODEL = "gspn_pico"
_DRAWN_SIDE = 1280  # more pixels than the figure shows would only be thrown away


def explain(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A photograph: JPEG, PNG, WebP, ...")],
    point: Annotated[
        str | None, typer.Option("--point", metavar="X,Y", help="The pixel to ask about. Default: the centre.")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="A network of gspn, or a folder that timm or gspn saved.")
    ] = DEFAULT_MODEL,
    stage: Annotated[
        int, typer.Option(metavar="N", help="Which stage's scans, from 0, or from the end if negative.")
    ] = -1,
    block: Annotated[int, typer.Option(metavar="N", help="Which block of the stage, likewise.")] = -1,
    size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longer side, in pixels, at which the network sees the image.")
    ] = 448,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the weights, where there are no pretrained ones.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PNG", dir_okay=False, help="Image to write.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="CSV", dir_okay=False, help="Table of the scans' stability to write.")
    ] = None,
) -> None:
    """Draw what one point of an image takes from the rest of it, and check the stability of every scan.

    The affinity is the row of the matrix that the scans stand for, taken with one vector-Jacobian product a direction:
    the mean of its magnitude over the channels, all directions together and each of them alone.

    The table has, for each scan, the sum of a pixel's taps (1), the largest state, how many times the largest input
    that is, and whether float16 holds it. Exit code 1 if one of them leaves the bound of the theory.
    """
    console = Console()
    _require_extras(output)
    if output is not None and output.suffix.lower() != ".png":
        raise typer.BadParameter(f"{str(output)!r} does not end in .png.", param_hint="--output")
    pixels = _load(image)
    height, width = pixels.shape[1:]
    where = (width // 2, height // 2) if point is None else _point(point, width, height)

    from gspn.analysis.explain import explain as run
    from gspn.analysis.networks import open_network

    try:
        network = open_network(model, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    except OSError as error:
        raise _failed(f"the weights of {model} cannot be fetched: {error}") from None
    if network.weights.startswith("random"):
        console.print(
            f"[yellow]{escape(network.name)} has no pretrained weights; these are {network.weights}.[/] "
            "The maps show how information can spread, not what a trained network makes of it.",
            highlight=False,
        )
    try:
        with torch.no_grad():
            explanation = run(network, pixels, where, size=size, stage=stage, block=block)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    console.print(_table(explanation.stability, explanation.found.name, f"{network.name} on {image.name}"))
    if output is not None:
        from gspn._figures import save_figure
        from gspn.analysis.drawing import draw_explanation

        save_figure(draw_explanation(explanation, _at_most(pixels, _DRAWN_SIDE)), output)
        _wrote(console, output)
    if report is not None:
        from gspn.analysis.stability import write_stability

        write_stability(report, explanation.stability)
        _wrote(console, report)
    if not all(entry.ok for entry in explanation.stability):
        raise _failed("not every scan keeps its bound; see the table.")


def _require_extras(output: Path | None) -> None:
    try:
        import PIL
        import timm  # noqa: F401

        del PIL
    except ImportError as error:
        raise _failed(f'gspn explain needs {error.name}; pip install "gspn[train]".') from None
    if output is not None:
        from gspn._figures import require_matplotlib

        try:
            require_matplotlib()
        except ImportError as error:
            raise _failed(str(error)) from None


def _load(path: Path) -> Tensor:
    """The image as ``[3, H, W]`` in 0 to 1."""
    from gspn.data import load_image

    try:
        image = load_image(path)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="IMAGE") from None
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror or error}.", param_hint="IMAGE") from None
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def _at_most(image: Tensor, side: int) -> Tensor:
    height, width = image.shape[1:]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _point(text: str, width: int, height: int) -> tuple[int, int]:
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not X,Y, as in 320,240.", param_hint="--point") from None
    if not (0 <= x < width and 0 <= y < height):
        raise typer.BadParameter(f"{text!r} lies outside the image of {width} x {height} pixels.", param_hint="--point")
    return x, y


def _table(report: Sequence[ScanStability], shown: str, title: str) -> Table:
    table = Table(
        title=f"scans of {escape(title)}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("block", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for heading in ("tap sum", "max |h|", "growth", "float16"):
        table.add_column(heading, justify="right", no_wrap=True)
    for _, group in groupby(report, key=lambda entry: entry.module):
        entries = list(group)
        for lead, entry in zip(_lead(entries, shown), entries, strict=True):
            low, high = f"{entry.tap_sum_min:.5f}", f"{entry.tap_sum_max:.5f}"
            table.add_row(
                lead,
                entry.direction,
                low if low == high else f"{low}..{high}",
                f"{entry.state_max:.3g}",
                f"{entry.growth:.1f}x",
                "finite" if entry.float16_finite else "[yellow]overflows[/]",
                style=None if entry.ok else "bold red",
            )
        table.add_section()
    return table


def _lead(entries: Sequence[ScanStability], shown: str) -> list[str]:
    """What stands before a module's rows: at most three lines, and it has a row for each direction."""
    first = entries[0]
    name = escape(first.module.removesuffix(".mixer.gspn"))
    lines = [
        f"[bold]{name}[/]" if first.module == shown else name,
        f"[dim]{first.channels} x {first.height} x {first.width}[/]",
        "[dim]global[/]" if first.segment is None else f"[dim]segments of {first.segment}[/]",
    ]
    return [*lines, *[""] * len(entries)][: len(entries)]


def _wrote(console: Console, path: Path) -> None:
    console.print(f"[dim]wrote[/] {escape(str(path))}", highlight=False, soft_wrap=True)


def _failed(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)
