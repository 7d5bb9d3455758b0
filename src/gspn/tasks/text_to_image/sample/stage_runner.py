"""Draws one batch of images through its stages, keeps the finished stages on disk, and shows the progress.

A run that was stopped continues after its last whole stage.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gspn.diffusers.timesteps import set_timesteps

from ...._errors import UsageError
from ...._files import open_tensors, printable, read_json, short, write_text
from ...core.progress import PlainProgress, counted
from ...diffusion.digests import digest
from ...diffusion.shard_cache import save_tensors
from ..decoding import to_latents, to_pixels
from .denoising import denoise, draw_noise, first_step, image_generators
from .progressive_upscaling import DilatedSampling, Stage, enlarge, segmented_scans, skip_residual
from .unet_by_rows import UNetByRows

if TYPE_CHECKING:
    from .sampling import RunPlan

DIRECTORY = "stages"
"""In the directory of the images."""

_SETTINGS = "settings.json"
_LATENTS = "latents"
_METADATA = "gspn"


class StageCache:
    """The finished stages of a run's images, and the settings that they were sampled with.

    Args:
        directory: Of the images.
        settings: Everything that the images depend on, as JSON has it.

    Raises:
        UsageError: The directory was begun with other settings; the first that differs is named.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory / DIRECTORY
        self.settings = json.loads(json.dumps(settings))
        text = json.dumps(self.settings, indent=1)
        self._digest = digest([text.encode()])
        begun = read_settings(directory)
        if begun is None:
            write_text(self.directory / _SETTINGS, text + "\n")
            return
        for key in self.settings | begun:
            before, now = begun.get(key), self.settings.get(key)
            if before != now:
                raise UsageError(
                    f"{str(directory)!r} holds a run with {key}={short(before)}, and this run has {short(now)}; "
                    "pass the arguments that it was started with, or name another output."
                )

    def save(self, index: int, stage: int, latents: Tensor) -> None:
        """Keep an image's latents ``[C, h, w]`` of a finished stage, counted from 0."""
        save_tensors(self._path(index, stage), {_LATENTS: latents}, self._metadata(index, stage, latents))

    def load(self, index: int, stage: int, shape: tuple[int, ...]) -> Tensor | None:
        """The latents that :meth:`save` kept; None where there are none, or the file is damaged or of another run."""
        try:
            with open_tensors(self._path(index, stage)) as file:
                metadata, latents = file.metadata(), file.get_tensor(_LATENTS)
        except (UsageError, OSError):
            return None
        whole = tuple(latents.shape) == shape and metadata == self._metadata(index, stage, latents)
        return latents if whole else None

    def _path(self, index: int, stage: int) -> Path:
        return self.directory / f"{index:05d}-stage{stage + 1}.safetensors"

    def _metadata(self, index: int, stage: int, latents: Tensor) -> dict[str, str]:
        # A single entry: safetensors writes several in no fixed order, and the same run has to write the same bytes.
        return {_METADATA: json.dumps([self._digest, index, stage, digest([latents])])}


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings of the stages in a directory of images, or None where there are none.

    Raises:
        UsageError: They cannot be read.
    """
    path = directory / DIRECTORY / _SETTINGS
    if not path.exists():
        return None
    try:
        settings = read_json(path)
    except (UsageError, OSError):
        settings = None
    if not isinstance(settings, dict):
        raise UsageError(f"{printable(path)!r} is damaged; remove {printable(path.parent)!r}, or name another output.")
    return settings


class RunProgress(Progress):
    """One bar for all stages of all images; without a terminal, a line for each stage, and one every 30 seconds.

    Args:
        console: Where to print.
        stages: The number of stages of each image.
        steps: The denoising steps of the run.
    """

    def __init__(self, console: Console, stages: int, steps: int) -> None:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._stages, self._steps, self._bar = stages, steps, self.add_task("drawing", total=steps)
        self._plain, self._what, self._done, self._start = PlainProgress(console), "drawing", 0, time.monotonic()

    def steps_done(self, steps: int = 1) -> None:
        """Move the bar forward."""
        self.advance(self._bar, steps)
        self._done += steps
        elapsed = time.monotonic() - self._start
        self._plain.tick(lambda: f"{self._what}: step {counted(self._done, self._steps, elapsed)}")

    def describe(self, text: str) -> None:
        """Show what is being done."""
        self._what = text
        self.update(self._bar, description=text)

    @contextlib.contextmanager
    def stage(self, number: int, stage: Stage, indices: Sequence[int]) -> Iterator[None]:
        """Within the block, a stage of some images is drawn; stages are counted from 0."""
        images = f"images {indices[0]} to {indices[-1]}" if len(indices) > 1 else f"image {indices[0]}"
        part = f", stage {number + 1} of {self._stages}" if self._stages > 1 else ""
        text, start = f"{images}{part}: {stage.width}x{stage.height}", time.perf_counter()
        self.describe(text)
        yield
        seconds, steps = time.perf_counter() - start, "1 step" if stage.steps == 1 else f"{stage.steps} steps"
        self._plain.say(f"{text}, {steps} in {seconds:.1f} s")


class StageRunner:
    """Draws batches of images as a plan says.

    Args:
        plan: The plan, its pipeline on its device.
        cache: Keeps the latents of finished stages; None to keep nothing.
    """

    def __init__(self, plan: RunPlan, cache: StageCache | None) -> None:
        self._plan, self._cache = plan, cache
        self._unet = UNetByRows(plan.pipeline.unet) if plan.request.shard_image else plan.pipeline.unet

    def draw(self, indices: Sequence[int], progress: RunProgress) -> Tensor:
        """The finished latents ``[B, C, h, w]`` of the images with these indices.

        Drawing starts after the last stage that the cache has for all of them.
        """
        stages = self._plan.stages
        finished, latents = self._cached(indices)
        progress.steps_done(sum(stage.steps for stage in stages[:finished]))
        for number, stage in enumerate(stages[finished:], start=finished):
            with progress.stage(number, stage, indices):
                latents = self._draw_stage(number, latents, indices, progress)
            if self._cache is not None and self._plan.writes:
                for index, one in zip(indices, latents, strict=True):
                    self._cache.save(index, number, one)
        return latents

    def _cached(self, indices: Sequence[int]) -> tuple[int, Any]:
        """How many stages are finished for all images, and the latents of the last one; None where there is none."""
        if self._cache is not None:
            for number in reversed(range(len(self._plan.stages))):
                shape = self._shape(self._plan.stages[number])
                latents = [self._cache.load(index, number, shape) for index in indices]
                present = [one for one in latents if one is not None]
                if self._plan.all_agree(len(present) == len(latents)):
                    return number + 1, torch.stack(present).to(self._plan.device)
        return 0, None

    def _shape(self, stage: Stage) -> tuple[int, int, int]:
        factor = self._plan.factor
        return self._plan.pipeline.unet.config.in_channels, stage.height // factor, stage.width // factor

    def _draw_stage(self, number: int, before: Tensor | None, indices: Sequence[int], progress: RunProgress) -> Tensor:
        plan, stage, config = self._plan, self._plan.stages[number], self._plan.request.upscale
        steps, inputs = plan.request.steps, plan.guidance_inputs(indices)
        scheduler = type(plan.scheduler).from_config(plan.scheduler.config)  # without the history of earlier stages
        set_timesteps(scheduler, steps, plan.device)
        generators = image_generators(plan.request.seed, indices, number)
        noise = draw_noise(generators, self._shape(stage), plan.device)
        blend = refine = None
        begin, segments = 0, {}
        if before is None or stage.strength is None or config is None:
            latents = noise * scheduler.init_noise_sigma
        else:
            begin, segments = first_step(steps, stage.strength), plan.segments
            clean = self._enlarge(before, stage, config.space)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            latents = scheduler.add_noise(clean, noise, scheduler.timesteps[begin].reshape(1))
            if config.skip_residual:
                blend = skip_residual(scheduler, clean, noise, begin, config.skip_power)
            if config.dilated and stage.dilation > 1:
                refine = DilatedSampling(self._unet, scheduler, inputs, stage.dilation, plan.factor, begin, config)
        with segmented_scans(plan.pipeline.unet, segments):
            return denoise(
                self._unet, scheduler, latents, inputs, height=stage.height, width=stage.width, generators=generators,
                begin=begin, blend=blend, refine=refine, on_step=progress.steps_done,
            )  # fmt: skip

    def _enlarge(self, latents: Tensor, stage: Stage, space: str) -> Tensor:
        if space == "latents":
            return enlarge(latents, *self._shape(stage)[1:])
        result = []
        for one in latents.split(1):  # one by one, because pixels take much memory
            pixels = enlarge(to_pixels(self._plan.pipeline, one), stage.height, stage.width)
            result.append(to_latents(self._plan.pipeline, pixels.clamp(-1, 1)))
        return torch.cat(result).to(latents)
