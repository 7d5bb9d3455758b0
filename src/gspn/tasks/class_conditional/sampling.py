"""Sample images of classes: :func:`sample`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from gspn.diffusers.timesteps import set_timesteps

from ..._console import default_console
from ..._errors import UsageError
from ..._locks import DirectoryLock
from ..core.devices import make_accelerator
from ..core.progress import progress_bar
from ..core.seeding import derived_seed
from ..diffusion.image_grid import draw_grid
from ..diffusion.images import ImageRecord, save_png
from ..diffusion.schedulers import named_scheduler
from .model import load_pipeline

_GRID_IMAGES, _GRID_PIXELS = 400, 1 << 25  # of the grid, at most


@dataclass(frozen=True, kw_only=True)
class SampleRecord(ImageRecord):
    """How an image of a class was sampled; written into its file."""

    label: int
    class_name: str
    model: str


@dataclass(frozen=True)
class Samples:
    """The result of :func:`sample`."""

    directory: Path
    records: tuple[SampleRecord, ...]
    """Of all images, in order."""
    grid: Path | None
    """The grid of images, or None."""
    seconds: float
    """Time that this process sampled."""
    is_main: bool = True
    """Whether this is the process that prints."""


def sample(
    model: str | Path, *, output: str | Path, classes: Sequence[int | str] | None = None, number: int | None = None,
    seed: int = 0, guidance: float = 2.0, steps: int = 50, scheduler: str = "auto", height: int | None = None,
    width: int | None = None, batch_size: int = 64, precision: str = "fp32", device: str = "auto", grid: bool = True,
    console: Console | None = None,
) -> Samples:  # fmt: skip
    """Sample images of classes, as PNG files that hold their record, and a grid of the first.

    The noise of image i depends on the seed and on i alone: the batch size and the number of processes change no image,
    beyond rounding. Started by ``torchrun``, each process samples its share.

    Args:
        model: A pipeline for :func:`~gspn.tasks.class_conditional.model.load_pipeline`.
        output: A directory; images are ``00000.png`` and so on, the grid is ``grid.png``.
        classes: Numbers or names, taken in turn; all by default. A text that is a name and a number is the name.
        number: Images in all; by default eight of each class.
        seed: Of the noise.
        guidance: Guidance scale; 1 disables it.
        steps: Number of denoising steps.
        scheduler: One of :data:`~gspn.tasks.diffusion.schedulers.SCHEDULERS`, or ``"auto"``: DDIM, or Euler's steps for
            a flow.
        height: Of the images; by default that of the training.
        width: Of the images; by default that of the training.
        batch_size: Images at a time.
        precision: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` by autocast.
        device: ``"auto"`` uses a GPU if there is one, ``"cpu"`` does not.
        grid: Whether to draw the grid: of the first 400 images at most, and fewer if they are large.
        console: Where to print; standard output by default.

    Raises:
        UsageError: The pipeline cannot be loaded, or an argument does not fit it.

    Example:
        >>> from gspn.tasks.class_conditional import sample
        >>> sample("runs/digits", output="/tmp/threes", classes=[3], number=4)  # doctest: +SKIP
    """
    pipeline = load_pipeline(model)
    pipeline.scheduler = named_scheduler(scheduler, pipeline.scheduler)
    try:
        chosen = range(pipeline.num_classes or 1) if classes is None else classes
        labels = pipeline.label_ids([_number_or_name(one, pipeline.labels) for one in chosen])
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not labels:
        raise UsageError("no classes to sample; name some, or leave them out for all.")
    total = 8 * len(labels) if number is None else number
    if total < 1 or batch_size < 1 or steps < 1:
        raise UsageError(f"number {total}, batch size {batch_size} and steps {steps} have to be at least 1.")
    if not 0 <= guidance < math.inf:
        raise UsageError(f"guidance {guidance} has to be 0 or more; 1 disables it.")
    set_timesteps(pipeline.scheduler, steps)  # refuses too many, before anything is drawn
    accelerator = make_accelerator(precision=precision, device=device)
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    name = Path(model).name if Path(model).is_dir() else str(model)
    common = {"seed": seed, "steps": steps, "guidance": guidance, "model": name}
    records = sample_records(pipeline, labels, total, height=height, width=width, **common)
    directory = Path(output)
    own = records[accelerator.process_index :: accelerator.num_processes]
    start = time.perf_counter()
    shown = (console or default_console()) if accelerator.is_main_process else None
    # One process holds the directory for all.
    with DirectoryLock(directory) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        with progress_bar(shown, "sampling", len(own)) as advance:
            for begin in range(0, len(own), batch_size):
                batch = own[begin : begin + batch_size]
                with accelerator.autocast():
                    images = sample_batch(pipeline, batch)
                for record, image in zip(batch, images, strict=True):
                    save_png(record.path(directory), image, record)
                advance(len(batch))
        seconds = time.perf_counter() - start
        accelerator.wait_for_everyone()
    path = None
    if grid and accelerator.is_main_process:
        path = directory / "grid.png"
        chosen = _for_grid(records, len(labels))
        save_png(path, draw_classes([_read(one.path(directory)) for one in chosen], chosen, len(labels)))
        if len(chosen) < len(records) and shown is not None:
            shown.print(f"grid.png shows the first {len(chosen):,} of {len(records):,} images", highlight=False)
    return Samples(directory, records, path, seconds, accelerator.is_main_process)


def _number_or_name(one: int | str, names: Mapping[str, int]) -> int | str:
    is_number = isinstance(one, str) and one not in names and one.isascii() and one.isdecimal() and len(one) < 20
    return int(one) if is_number else one


def sample_records(
    pipeline: Any, labels: Sequence[int], total: int, *, height: int | None = None, width: int | None = None,
    **common: Any,
) -> tuple[SampleRecord, ...]:  # fmt: skip
    """The records of ``total`` images to sample, with classes taken in turn; ``common`` fields are those of all.

    Height and width are those of the training by default.
    """
    names, side = {int(key): name for key, name in pipeline.config["id2label"].items()}, pipeline.default_size
    common |= {"height": side if height is None else height, "width": side if width is None else width}
    common["scheduler"] = type(pipeline.scheduler).__name__
    chosen = [labels[i % len(labels)] for i in range(total)]
    return tuple(
        SampleRecord(index=i, label=label, class_name=names.get(label, str(label)), **common)
        for i, label in enumerate(chosen)
    )


def sample_batch(pipeline: Any, records: Sequence[SampleRecord]) -> list[Image.Image]:
    """The images of some records, each from its own noise."""
    # On the CPU, so that the noise does not depend on the device of the model.
    generators = [torch.Generator().manual_seed(derived_seed(one.seed, "sample", one.index)) for one in records]
    first = records[0]
    try:
        return pipeline(
            [one.label for one in records],
            height=first.height,
            width=first.width,
            guidance_scale=first.guidance,
            num_inference_steps=first.steps,
            generator=generators,
        ).images
    except ValueError as error:
        raise UsageError(str(error)) from None


def _for_grid(records: Sequence[SampleRecord], classes: int) -> Sequence[SampleRecord]:
    """The first records, as many as one can look at and as fit into little memory: whole columns of the grid."""
    count = min(len(records), _GRID_IMAGES, max(1, _GRID_PIXELS // (records[0].height * records[0].width)))
    return records[: count // classes * classes if classes <= count < len(records) else count]


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def draw_classes(images: Sequence[Image.Image], records: Sequence[SampleRecord], classes: int) -> Image.Image:
    """One image of all: a row for each of ``classes`` that take turns, or a square of the images of a single class."""
    if classes > 1:
        rows = [images[row::classes] for row in range(min(classes, len(images)))]
        return draw_grid(rows, names=[record.class_name for record in records[: len(rows)]])
    columns = math.ceil(math.sqrt(len(images)))
    return draw_grid([images[begin : begin + columns] for begin in range(0, len(images), columns)])
