"""``gspn t2i sample``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..messages import one_line_errors
from ..options import Device, DeviceName, PrecisionName


class Tiling(StrEnum):
    """Whether the VAE works in tiles."""

    auto = "auto"
    on = "on"
    off = "off"


class Offload(StrEnum):
    """What waits in host memory."""

    none = "none"
    auto = "auto"
    model = "model"
    activations = "activations"
    all = "all"


class Upscale(StrEnum):
    """Where a finished stage is enlarged."""

    latents = "latents"
    pixels = "pixels"


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several take turns.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="A run's directory, a pipeline's, a shipped name, a hub id."
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="NAME", help="Likewise; default: the model's attention.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For the images.")] = Path("samples"),
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="As 8192x4096, or one side; default: the training's.")
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", metavar="N", min=1, help="Images of each prompt.")] = 1,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What guidance leads away from.")] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Of the scheduler.")] = 30,
    guidance: Annotated[float, typer.Option(metavar="SCALE", min=0, help="1: none. The paper's is 7.")] = 5.0,
    scheduler: Annotated[
        str, typer.Option(metavar="NAME", help="auto, ddim, ddpm, dpm++, dpm++_sde, unipc, euler, euler_a.")
    ] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 1,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="In stages from the training's size up; a stopped run goes on.")
    ] = False,
    strength: Annotated[
        list[float] | None,
        typer.Option(metavar="S", help="Of the noise at the second stage, the third, ... Repeatable; the last stays."),
    ] = None,
    skip_residual: Annotated[bool, typer.Option(help="Pull each stage to the one before.")] = True,
    skip_power: Annotated[float, typer.Option(metavar="A", help="How soon that lets go.")] = 3.0,
    dilated: Annotated[bool, typer.Option("--dilated", help="Mix in predictions for strided sub-maps.")] = False,
    dilated_power: Annotated[float, typer.Option(metavar="A", help="How soon that lets go.")] = 1.0,
    restart: Annotated[
        bool, typer.Option(help="Restart the adapter's scans beyond the first stage after as many lines as it has.")
    ] = True,
    upscale: Annotated[Upscale, typer.Option(help="Where a stage is enlarged.")] = Upscale.latents,
    tiling: Annotated[Tiling, typer.Option(help="Of the VAE; auto: above 1536x1536.")] = Tiling.auto,
    offload: Annotated[
        Offload, typer.Option(help="To host memory: whole models, the UNet's skip tensors, or both.")
    ] = Offload.none,
    precision: Annotated[PrecisionName, typer.Option(help="Of the weights.")] = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    check: Annotated[bool, typer.Option(help="Estimate first, and refuse what does not fit.")] = True,
    estimate_only: Annotated[bool, typer.Option("--estimate-only", help="Draw nothing.")] = False,
) -> None:
    """Draw images from text, each a PNG with its origin in it.

    The same seed gives the same images whatever the batch size. Before it starts, it says what time and memory it
    will take.
    """
    with one_line_errors():
        width, height = _sides(size)
        from gspn.tasks.core.errors import UsageError
        from gspn.tasks.text_to_image.sample.progressive_upscaling import LadderConfig
        from gspn.tasks.text_to_image.sample.sampling import sample as run

        if not ladder and (strength or dilated):
            raise UsageError(f"{'--strength' if strength else '--dilated'} is of a ladder; add --ladder.")
        console = Console()
        strengths = tuple(strength) if strength else LadderConfig().strengths
        found = run(
            model,
            prompts,
            output=output,
            adapter=adapter,
            negative=negative,
            number=number,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            seed=seed,
            batch_size=batch_size,
            ladder=LadderConfig(
                strengths=strengths,
                skip_residual=skip_residual,
                skip_power=skip_power,
                dilated=dilated,
                dilated_power=dilated_power,
                restart=restart,
                upscale=upscale.value,
            )
            if ladder
            else False,
            precision=precision.value,
            device=device.value,
            tiling=tiling.value,
            offload=offload.value,
            check=check,
            estimate_only=estimate_only,
            console=console,
        )
        if estimate_only:
            return
        kept = len(found.records) - found.drawn
        console.print(
            f"[dim]wrote[/] {found.drawn} images to {escape(str(found.directory))} in {found.seconds:.1f} s"
            + (f"; {kept} were there" if kept else ""),
            highlight=False,
            soft_wrap=True,
        )


def _sides(size: str | None) -> tuple[int | None, int | None]:
    """Width and height."""
    from gspn.tasks.core.errors import UsageError

    if size is None:
        return None, None
    width, by, height = size.lower().partition("x")
    if not width.isdigit() or (by and not height.isdigit()):
        raise UsageError(
            f"--size {size!r} is no size; give the width and the height, as 8192x4096, or one side, as 512."
        )
    return int(width), int(height) if by else int(width)
