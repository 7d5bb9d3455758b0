"""``gspn t2i sample``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gspn._console import Console
from gspn._errors import UsageError

from ..messages import wrote
from ..options import MOST_IMAGES, Device, DeviceName, OutputDirectory, PrecisionName, Size, parse_size

Tiling = StrEnum("Tiling", ["auto", "on", "off"])
Offload = StrEnum("Offload", ["none", "auto", "model", "activations", "all"])
Space = StrEnum("Space", ["latents", "pixels"])


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several take turns.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="NAME", help="Directory of a run or pipeline, shipped name, or hub id."),
    ],
    adapter: Annotated[str | None, typer.Option(
        "--adapter", "-a", metavar="NAME",
        help="Directory of a run or adapter, shipped name, or hub id. Default: the model's own attention.",
    )] = None,
    output: OutputDirectory = Path("samples"),
    size: Size = None,
    number: Annotated[
        int, typer.Option("--number", "-n", metavar="N", min=1, max=MOST_IMAGES, help="Images of each prompt.")
    ] = 1,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt for guidance.")] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Number of denoising steps.")] = 30,
    guidance: Annotated[
        float, typer.Option(metavar="SCALE", min=0, help="Guidance scale; 1 disables it. The paper uses 7.")
    ] = 5.0,
    scheduler: Annotated[
        str, typer.Option(metavar="NAME", help="auto, ddim, ddpm, dpm++, dpm++_sde, unipc, euler, euler_a.")
    ] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a batch.")] = 1,
    upscale: Annotated[
        bool,
        typer.Option("--upscale", help="Draw in stages from the trained size up; an interrupted run can continue."),
    ] = False,
    strength: Annotated[list[float] | None, typer.Option(
        metavar="S", help="Noise strength of the second stage, the third, ... Repeatable; the last holds."
    )] = None,
    skip_residual: Annotated[bool, typer.Option(help="Pull each stage towards the one before.")] = True,
    skip_power: Annotated[float, typer.Option(metavar="A", help="Exponent of its decay.")] = 3.0,
    dilated: Annotated[bool, typer.Option("--dilated", help="Blend in predictions for strided sub-maps.")] = False,
    dilated_power: Annotated[float, typer.Option(metavar="A", help="Exponent of its decay.")] = 1.0,
    segment_scans: Annotated[bool | None, typer.Option(
        "--segment-scans/--no-segment-scans", show_default="where the adapter has no reference lines",
        help="Beyond the first stage, restart the adapter's scans after as many lines as it has.",
    )] = None,
    upscale_space: Annotated[Space, typer.Option(help="Where a finished stage is enlarged.")] = Space.latents,
    tiling: Annotated[Tiling, typer.Option(help="Tiles for the VAE; auto: above 1536x1536.")] = Tiling.auto,
    offload: Annotated[
        Offload, typer.Option(help="Keep whole models, the UNet's skip tensors, or both in host memory.")
    ] = Offload.none,
    shard_image: Annotated[bool, typer.Option(
        "--shard-image", help="Under torchrun: split each image by rows over the processes. Needs --adapter."
    )] = False,
    precision: Annotated[PrecisionName, typer.Option(help="Precision of the weights.")] = PrecisionName.fp32,
    device: Device = DeviceName.auto,
    check: Annotated[bool, typer.Option(help="Estimate time and memory first, and refuse what does not fit.")] = True,
    estimate_only: Annotated[
        bool, typer.Option("--estimate-only", help="Print the estimate and draw nothing.")
    ] = False,
) -> None:  # fmt: skip
    """Draw images from text, each a PNG that records its origin.

    The same seed gives the same images for any batch size. For several GPUs start it with torchrun: the processes share
    the images, or with --shard-image the rows of each image. Time and memory are estimated before the run starts.
    """
    width, height = (None, None) if size is None else parse_size(size)
    from gspn.tasks.text_to_image.sample import UpscalingConfig
    from gspn.tasks.text_to_image.sample import sample as run

    if not upscale and (strength or dilated):
        raise UsageError(f"{'--strength' if strength else '--dilated'} needs --upscale.")
    upscaling = UpscalingConfig(
        strengths=tuple(strength) if strength else UpscalingConfig().strengths,
        skip_residual=skip_residual, skip_power=skip_power, dilated=dilated, dilated_power=dilated_power,
        segment_scans=segment_scans, space=str(upscale_space),
    )  # fmt: skip
    console = Console()
    result = run(
        model, prompts, output=output, upscale=upscaling if upscale else False, console=console, adapter=adapter,
        negative=negative, number=number, height=height, width=width, steps=steps, guidance=guidance,
        scheduler=scheduler, seed=seed, batch_size=batch_size, precision=precision.value, device=device.value,
        tiling=tiling.value, offload=offload.value, shard_image=shard_image, check=check,
        estimate_only=estimate_only,
    )  # fmt: skip
    if estimate_only or not result.is_main:
        return
    kept = len(result.records) - result.drawn
    wrote(
        f"{result.drawn} images to {result.directory} in {result.seconds:.1f} s"
        + (f"; {kept} were finished before" if kept else "")
    )
