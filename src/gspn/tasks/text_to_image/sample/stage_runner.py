"""One batch of images through its stages, and what is seen of it meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..decoding import to_images, to_latents, to_pixels
from ..denoising import Guide, begin_of, denoise, draw_noise, fresh, image_generators
from .progressive_upscaling import Dilated, LadderConfig, Stage, enlarge, skip_residual
from .segments import restarting
from .stage_cache import LadderState


class RunProgress:
    """One bar for all stages of all images, the stage's name in it; off a terminal a line a stage.

    Args:
        console: Where.
        stages: Of each image.
        total: Steps of the run.
    """

    def __init__(self, console: Console, stages: int, total: int) -> None:
        self._console, self._stages = console, stages
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("drawing", total=total)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def passed(self, steps: int = 1) -> None:
        """So many steps more are done."""
        self._bar.advance(self._task, steps)

    def told(self, what: str) -> None:
        """What is going on now."""
        self._bar.update(self._task, description=what)

    @contextmanager
    def stage(self, number: int, stage: Stage, indices: Sequence[int]) -> Iterator[None]:
        """While a stage, counted from 0, of some images is drawn."""
        many = f"images {indices[0]} to {indices[-1]}" if len(indices) > 1 else f"image {indices[0]}"
        part = f", stage {number + 1} of {self._stages}" if self._stages > 1 else ""
        what, start = f"{many}{part}: {stage.width}x{stage.height}", time.perf_counter()
        self.told(what)
        yield
        if not self._console.is_terminal:
            seconds, steps = time.perf_counter() - start, "1 step" if stage.steps == 1 else f"{stage.steps} steps"
            self._console.print(f"{what}, {steps} in {seconds:.1f} s", highlight=False, soft_wrap=True)


class Drawing:
    """How the images of a run are drawn.

    Args:
        pipeline: On its device.
        scheduler: Whose like walks each stage.
        stages: Of each image.
        ladder: As the stages were planned; None for one stage.
        device: That computes.
        steps: Of the whole chain.
        seed: Of the noise.
        state: Where finished stages are kept; None for nowhere.
        lines: By the name of a mixer, after how many its scans restart beyond the first stage.
    """

    def __init__(
        self, pipeline: Any, scheduler: Any, stages: Sequence[Stage], ladder: LadderConfig | None, device: torch.device,
        *, steps: int, seed: int, state: LadderState | None = None, lines: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self._pipeline, self._scheduler, self._stages, self._ladder = pipeline, scheduler, stages, ladder
        self._device, self._chain_steps, self._seed, self._state = device, steps, seed, state
        self._lines = lines or {}

    @property
    def steps(self) -> int:
        """That are taken for one batch."""
        return sum(stage.steps for stage in self._stages)

    @property
    def stages(self) -> int:
        """Of each image."""
        return len(self._stages)

    @property
    def resumes(self) -> bool:
        """Whether finished stages are kept."""
        return self._state is not None

    def decode(self, latents: Tensor) -> Image.Image:
        """The image of finished latents ``[C, h, w]``."""
        return to_images(self._pipeline, to_pixels(self._pipeline, latents[None]))[0]

    def draw(self, indices: Sequence[int], guide: Guide, progress: RunProgress) -> Tensor:
        """The finished latents ``[B, C, h, w]`` of some images, from the last stage on that all have kept."""
        first, latents = self._kept(indices)
        progress.passed(sum(stage.steps for stage in self._stages[:first]))
        for number, stage in enumerate(self._stages[first:], start=first):
            with progress.stage(number, stage, indices):
                latents = self._draw_stage(number, latents, indices, guide, progress)
            if self._state is not None:
                for index, one in zip(indices, latents, strict=True):
                    self._state.save(index, number, one)
        if latents is None:
            raise RuntimeError("an image has no stage")  # plan_stages gives one at least
        return latents

    def _kept(self, indices: Sequence[int]) -> tuple[int, Tensor | None]:
        if self._state is not None:
            for number in reversed(range(len(self._stages))):
                found = [self._state.load(index, number, self._shape(self._stages[number])) for index in indices]
                whole = [one for one in found if one is not None]
                if len(whole) == len(found):
                    return number + 1, torch.stack(whole).to(self._device)
        return 0, None

    def _shape(self, stage: Stage) -> tuple[int, int, int]:
        factor = self._pipeline.vae_scale_factor
        return self._pipeline.unet.config.in_channels, stage.height // factor, stage.width // factor

    def _draw_stage(
        self, number: int, before: Tensor | None, indices: Sequence[int], guide: Guide, progress: RunProgress
    ) -> Tensor:
        stage, unet = self._stages[number], self._pipeline.unet
        chain = fresh(self._scheduler)
        chain.set_timesteps(self._chain_steps, device=self._device)
        generators = image_generators(self._seed, indices, number)
        noise = draw_noise(generators, self._shape(stage), self._device)
        blend = refine = None
        begin = 0
        if before is None or stage.strength is None or self._ladder is None:
            latents = noise * chain.init_noise_sigma
        else:
            begin = begin_of(self._chain_steps, stage.strength)
            clean = self._enlarged(before, stage)
            if hasattr(chain, "set_begin_index"):
                chain.set_begin_index(begin)
            latents = chain.add_noise(clean, noise, chain.timesteps[begin].reshape(1))
            if self._ladder.skip_residual:
                blend = skip_residual(chain, clean, noise, begin, self._ladder.skip_power)
            if self._ladder.dilated and stage.dilation > 1:
                factor = self._pipeline.vae_scale_factor
                refine = Dilated(
                    unet, chain, guide, stride=stage.dilation, factor=factor, begin=begin, config=self._ladder
                )
        with self._restarting(number):
            return denoise(
                unet, chain, latents, guide, height=stage.height, width=stage.width, generators=generators, begin=begin,
                blend=blend, refine=refine, on_step=progress.passed,
            )  # fmt: skip

    def _restarting(self, number: int) -> contextlib.AbstractContextManager[None]:
        return restarting(self._pipeline.unet, self._lines if number else {})

    def _enlarged(self, latents: Tensor, stage: Stage) -> Tensor:
        _, *size = self._shape(stage)
        if self._ladder is None or self._ladder.upscale == "latents":
            return enlarge(latents, *size)
        found = []
        for one in latents.split(1):  # one by one: pixels are many
            pixels = enlarge(to_pixels(self._pipeline, one), stage.height, stage.width)
            found.append(to_latents(self._pipeline, pixels.clamp(-1, 1)))
        return torch.cat(found).to(latents)
