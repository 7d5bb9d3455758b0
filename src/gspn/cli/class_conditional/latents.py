"""``gspn class-conditional latents``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import failed, one_line_errors, warn
from ..options import Device, DeviceName, Precision, PrecisionName

_NAMED = 5


def latents(
    vae: Annotated[
        str, typer.Option(metavar="PATH|HUB_ID", help="An AutoencoderKL of diffusers, or a pipeline with one.")
    ],
    data: Annotated[str, typer.Option(metavar="NAME", help="digits, emoji, folder, ...: a data set of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For the latents.")],
    split: Annotated[str, typer.Option(metavar="NAME", help="Of the data set.")] = "train",
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the data set lies.")] = None,
    size: Annotated[int, typer.Option(metavar="N", min=1, help="Height and width of the images.")] = 256,
    hflip: Annotated[bool, typer.Option("--hflip", help="Encode the mirrored images too.")] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 32,
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a file.")] = 4096,
    precision: Precision = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Processes that load images.")] = 4,
) -> None:
    """Encode a data set once, for gspn class-conditional train --latents.

    Start it again after a kill, and it goes on after the last whole file; files whose checksum does not fit are made
    anew. For several GPUs start it with torchrun: they share the files.
    """
    with one_line_errors():
        from gspn.tasks.class_conditional import cache_latents

        console = Console()
        try:
            found = cache_latents(
                vae,
                data=data,
                output=output,
                split=split,
                root=root,
                size=size,
                hflip=hflip,
                batch_size=batch_size,
                shard_size=shard_size,
                precision=precision.value,
                device=device.value,
                workers=workers,
                console=console,
            )
        except KeyboardInterrupt:
            raise failed(f"interrupted; the same command goes on with {output}", 130) from None
        if not found.is_main:
            return
        if found.broken:
            shown = "; ".join(found.broken[:_NAMED]) + ("; ..." if len(found.broken) > _NAMED else "")
            warn(f"{len(found.broken)} images could not be read and are left out, all named in index.json: {shown}")
        shape = " x ".join(map(str, found.index.shape))
        console.print(
            f"[dim]wrote[/] {found.index.images:,} latents of {shape} to {escape(str(found.directory))} in "
            f"{found.seconds:.1f} s ({found.made} of {len(found.index.shards)} files made by this process); train with "
            f"[bold]gspn class-conditional train --latents {escape(str(found.directory))}[/]",
            highlight=False,
            soft_wrap=True,
        )
