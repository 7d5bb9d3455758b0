"""What a run will take, before it starts: operations, time and the peak of memory of every stage.

The UNet and the VAE run on fake tensors, which have shapes and no content, at the full size; every operation is counted
and every allocation followed. Time is that of one real call at the size of the training (of small networks a few
stages above it), times the ratio of operations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from ...core.errors import UsageError
from ..conditioning import Conditioning, unet_arguments
from .memory_and_flops import Usage, decoder_usage, unet_usage
from .progressive_upscaling import LadderConfig, Stage

MARGIN = 1.15
"""On the peak: what kernels take besides their results, and what the allocator cannot join."""

_LATENT_MAPS = 8  # float32 maps of a stage: latents, noise, the enlarged ones, two predictions, and a solver's memory
_LONG_CALL = 2.0  # seconds
_SHORT_CALL = 0.1  # likewise
_GROWN = 32  # times the first size, up to which calls are timed that were too short
_PIXEL_MAPS = 3  # the decoded image, a copy of it while it is put together, and as bytes


@dataclass(frozen=True)
class StageEstimate:
    """Of one stage, or of what follows the last: decoding.

    Attributes:
        name: As printed.
        height: In pixels.
        width: Likewise.
        steps: Of denoising; 0 for decoding.
        operations: Of all its calls, for all images.
        peak: Bytes besides what is there before it starts.
        seconds: For all images; None where no time was taken.
    """

    name: str
    height: int
    width: int
    steps: int
    operations: int
    peak: int
    seconds: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        stages: In their order.
        available: Bytes that are free where it runs.
        device: Its name.
    """

    stages: tuple[StageEstimate, ...]
    available: int
    device: str

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.peak <= self.available for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        times = [stage.seconds for stage in self.stages]
        return None if None in times else sum(one for one in times if one is not None)

    def table(self) -> Table:
        """For a terminal."""
        table = Table(
            title=f"Estimate; {gigabytes(self.available)} free on {self.device}", title_justify="left", box=None
        )
        for heading in ("stage", "size", "steps", "operations", "memory", "time"):
            table.add_column(heading, justify="left" if heading == "stage" else "right")
        for stage in self.stages:
            too_much = "[bold red]" if stage.peak > self.available else ""
            table.add_row(
                stage.name, f"{stage.width}x{stage.height}", str(stage.steps or ""), f"{stage.operations / 1e12:.3g} T",
                f"{too_much}{gigabytes(stage.peak)}", "" if stage.seconds is None else duration(stage.seconds),
            )  # fmt: skip
        if self.seconds is not None:
            table.add_row("all", "", "", "", "", duration(self.seconds))
        return table

    def check(self, remedies: Sequence[str]) -> None:
        """Raise unless every stage fits.

        Args:
            remedies: What may help, as the message lists it.

        Raises:
            UsageError: one does not.
        """
        worst = max(self.stages, key=lambda stage: stage.peak)
        if worst.peak > self.available:
            raise UsageError(
                f"{worst.name} at {worst.width}x{worst.height} needs about {gigabytes(worst.peak)}, and "
                f"{gigabytes(self.available)} are free on {self.device}: {', '.join(remedies)}, or --no-check "
                "(check=False) to try nonetheless."
            )


def estimate_stages(
    pipeline: Any, stages: Sequence[Stage], text: Conditioning, *, ladder: LadderConfig | None, images: int,
    batch: int, guided: bool, split: bool, tiled: bool, offload: bool, device: torch.device, extra: int = 0,
) -> tuple[StageEstimate, ...]:  # fmt: skip
    """Operations and memory of a run's stages and of decoding, without times.

    Args:
        pipeline: Its adapter mounted.
        stages: Of each image.
        text: Any prompts.
        ladder: As the stages were planned.
        images: Of the run.
        batch: At a time.
        guided: With classifier-free guidance.
        split: In two calls.
        tiled: Whether the VAE works in tiles.
        offload: Whether the skip tensors wait in host memory.
        device: Where it will run.
        extra: Bytes that each stage needs besides: weights that are not there yet.
    """
    unet, factor = pipeline.unet, pipeline.vae_scale_factor
    calls, at_once = (2 if guided and split else 1), batch * (2 if guided and not split else 1)
    batches = math.ceil(images / batch)
    pixels = ladder is not None and ladder.upscale == "pixels"
    found = []
    for number, stage in enumerate(stages, start=1):

        def usage(height: int, width: int, batch: int) -> Usage:
            return unet_usage(
                unet, text, height=height, width=width, factor=factor, batch=batch, device=device, offload=offload
            )

        one = usage(stage.height, stage.width, at_once)
        operations, peak = one.operations, one.peak
        if ladder is not None and ladder.dilated and stage.dilation > 1:
            s = stage.dilation
            h, w = (math.ceil(side / factor / s) * factor for side in (stage.height, stage.width))
            sub = usage(h, w, at_once * s * s)
            operations, peak = operations + sub.operations, max(peak, sub.peak)
        maps = 4 * _LATENT_MAPS * batch * unet.config.in_channels * stage.height * stage.width // factor**2
        total, peak = operations * calls * stage.steps * batches, peak + maps
        if pixels and number > 1:
            # Encoding is counted as decoding, of which it has a little less.
            before = stages[number - 2]
            for size in ((before.height, before.width), (stage.height, stage.width)):
                there = decoder_usage(pipeline.vae, height=size[0], width=size[1], tiled=tiled, device=device)
                total, peak = total + there.operations * images, max(peak, there.peak + maps)
        name = f"stage {number} of {len(stages)}" if len(stages) > 1 else "denoising"
        found.append(StageEstimate(name, stage.height, stage.width, stage.steps, total, int(peak * MARGIN) + extra))
    last = stages[-1]
    there = decoder_usage(pipeline.vae, height=last.height, width=last.width, tiled=tiled, device=device)
    peak = int((there.peak + _PIXEL_MAPS * 4 * 3 * last.height * last.width) * MARGIN) + extra
    found.append(StageEstimate("decoding", last.height, last.width, 0, there.operations * images, peak))
    return tuple(found)


def base_operations(
    pipeline: Any, text: Conditioning, *, height: int, width: int, device: torch.device
) -> tuple[int, int]:
    """Operations of what :func:`with_times` times: one call of the UNet, and decoding one image."""
    unet, factor = pipeline.unet, pipeline.vae_scale_factor
    one = unet_usage(unet, text, height=height, width=width, factor=factor, batch=1, device=device)
    two = decoder_usage(pipeline.vae, height=height, width=width, tiled=False, device=device)
    return one.operations, two.operations


@torch.no_grad()
def with_times(
    stages: Sequence[StageEstimate], pipeline: Any, text: Conditioning, *, height: int, width: int,
    operations: tuple[int, int], device: torch.device, grow: bool = True,
) -> tuple[StageEstimate, ...]:  # fmt: skip
    """Stages with their times, from one real call of the UNet and one of the decoder at a small size.

    Args:
        stages: From :func:`estimate_stages`.
        pipeline: Ready to run.
        text: Any prompts, on the device.
        height: Of the image of the real calls.
        width: Likewise.
        operations: Of the two calls, from :func:`base_operations`.
        device: Where they run.
        grow: Whether to go on to the next stages' sizes while calls are so short that what surrounds the operations
            may take longer than they do.
    """
    larger = [
        (one.height, one.width) for one in stages if one.steps and 1 < one.height * one.width / height / width <= _GROWN
    ]
    sizes, counts = [(height, width), *(larger if grow else [])], operations
    rates = [math.inf, math.inf]
    for number, size in enumerate(sizes):
        if number:
            counts = base_operations(pipeline, text, height=size[0], width=size[1], device=device)
        times = _times(pipeline, text[:1], *size, device)
        rates = [took / max(count, 1) for took, count in zip(times, counts, strict=True)]
        if min(times) > _SHORT_CALL:
            break
    return tuple(replace(one, seconds=one.operations * rates[0 if one.steps else 1]) for one in stages)


def _times(pipeline: Any, text: Conditioning, height: int, width: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a call of the UNet and of decoding, of one image."""
    unet, vae, factor = pipeline.unet, pipeline.vae, pipeline.vae_scale_factor
    sides = height // factor, width // factor
    latents = torch.zeros(1, unet.config.in_channels, *sides, dtype=unet.dtype, device=device)
    arguments = unet_arguments(unet, text, height, width)
    z = torch.zeros(1, vae.config.latent_channels, *sides, dtype=vae.dtype, device=device)
    return _seconds(lambda: unet(latents, 1, **arguments), device), _seconds(lambda: vae.decode(z), device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of the fastest of up to three calls: the first one chooses kernels, and with offloading brings the weights."""
    best, spent = math.inf, 0.0
    for _ in range(3):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
        if device.type == "cpu" and spent > _LONG_CALL:
            break  # where a first call is hardly slower than another
    return best


def gigabytes(count: float) -> str:
    """Bytes for people.

    Example:
        >>> gigabytes(31_300_000_000), gigabytes(2_500_000)
        ('31.3 GB', '2.5 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 5e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(0.25), duration(75), duration(4000)
        ('0.2 s', '1 min 15 s', '1 h 06 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
