"""``gspn class-conditional sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import one_line_errors
from ..options import Device, DeviceName, Precision, PrecisionName


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run's directory, a pipeline's, a shipped name, or a hub id.")
    ],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", "-k", metavar="CLASS", help="A number or a name. Repeatable; all by default."),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--number", "-n", metavar="N", min=1, help="Images; default: 8 of each class.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For the images.")] = Path("samples"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the noise.")] = 0,
    guidance: Annotated[float, typer.Option(metavar="SCALE", min=0, help="1: none.")] = 2.0,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Number of denoising steps.")] = 50,
    scheduler: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, ddpm, ddim, dpm++, dpm++_sde, unipc, euler, euler_a, flow or flow-heun."
        ),
    ] = "auto",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Of the images, as 64 or 48x64; default: the training's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 64,
    precision: Precision = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    grid: Annotated[bool, typer.Option(help="An image of all images.")] = True,
) -> None:
    """Draw images of classes, each a PNG with its origin in it, and a grid of all.

    The same seed gives the same images whatever the batch size. For several GPUs start it with torchrun.
    """
    with one_line_errors():
        height, width = _sides(size)
        from gspn.tasks.class_conditional import sample as run

        console = Console()
        found = run(
            model,
            output=output,
            classes=None if classes is None else [int(one) if one.isdigit() else one for one in classes],
            number=number,
            seed=seed,
            guidance=guidance,
            steps=steps,
            scheduler=scheduler,
            height=height,
            width=width,
            batch_size=batch_size,
            precision=precision.value,
            device=device.value,
            grid=grid,
            console=console,
        )
        if found.is_main:
            console.print(
                f"[dim]wrote[/] {len(found.records)} images to {escape(str(found.directory))} in "
                f"{found.seconds:.1f} s" + (f"; all of them: {escape(str(found.grid))}" if found.grid else ""),
                highlight=False,
                soft_wrap=True,
            )


def _sides(size: str | None) -> tuple[int | None, int | None]:
    from gspn.tasks.core.errors import UsageError

    if size is None:
        return None, None
    height, by, width = size.lower().partition("x")
    if not height.isdigit() or (by and not width.isdigit()):
        raise UsageError(f"--size {size!r} is no size; give the height and the width, as 48x64, or one side, as 64.")
    return int(height), int(width) if by else int(height)
