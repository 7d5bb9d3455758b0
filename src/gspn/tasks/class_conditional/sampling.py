"""Generating images: :func:`sample`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from ..._files import replaced
from ..core.devices import make_accelerator
from ..core.errors import UsageError
from ..core.progress import progress_bar
from ..core.seeding import derived_seed
from ..diffusion.schedulers import sampler as named_sampler
from .model import load_pipeline

METADATA = "gspn"
"""The key of an image's text in which its origin is written, as JSON."""


@dataclass(frozen=True)
class SampleRecord:
    """Where a generated image comes from; written into its file."""

    index: int
    label: int
    class_name: str
    seed: int
    sampler: str
    steps: int
    guidance: float
    height: int
    width: int
    model: str


@dataclass(frozen=True)
class Samples:
    """What :func:`sample` wrote.

    Attributes:
        directory: Of the images.
        records: Of all of them, in order.
        grid: The image of all images, or None.
        seconds: Spent sampling, by this process.
        is_main: Whether this is the process that prints.
    """

    directory: Path
    records: tuple[SampleRecord, ...]
    grid: Path | None
    seconds: float
    is_main: bool = True


def sample(
    model: str | Path,
    *,
    output: str | Path,
    classes: Sequence[int | str] | None = None,
    number: int | None = None,
    seed: int = 0,
    guidance: float = 2.0,
    steps: int = 50,
    sampler: str = "auto",
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    device: str = "auto",
    grid: bool = True,
    console: Console | None = None,
) -> Samples:
    """Generate images of classes, as PNG files with their origin in them, and a grid of all.

    Image i starts from noise that is a function of the seed and i alone: neither the batch size nor the number of
    processes changes it, beyond rounding. Started by ``torchrun``, each process draws its share.

    Args:
        model: What :func:`~gspn.tasks.class_conditional.model.load_pipeline` finds.
        output: A directory; images are ``00000.png`` and on, the grid ``grid.png``.
        classes: Numbers or names, taken in turn; all by default.
        number: How many images; by default eight of each class.
        seed: Of the noise.
        guidance: 1: none.
        steps: Of the sampler.
        sampler: One of :data:`~gspn.tasks.diffusion.schedulers.SAMPLERS`, or ``"auto"``.
        height: Of the images; by default that of the training.
        width: Likewise.
        batch_size: Images at a time.
        precision: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` by autocast.
        device: ``"auto"`` takes a GPU if there is one, ``"cpu"`` none.
        grid: Whether to draw it.
        console: Where to print; standard output by default.

    Returns:
        Where everything is.

    Raises:
        UsageError: a request that cannot be met.

    Example:
        >>> from gspn.tasks.class_conditional import sample
        >>> sample("runs/digits", output="/tmp/threes", classes=[3], number=4)  # doctest: +SKIP
    """
    pipeline = load_pipeline(model)
    pipeline.scheduler = named_sampler(sampler, pipeline.scheduler)
    try:
        chosen = pipeline.label_ids(list(range(pipeline.num_classes or 1)) if classes is None else list(classes))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not chosen:
        raise UsageError("no classes to generate; name some, or leave them out for all.")
    total = 8 * len(chosen) if number is None else number
    if total < 1 or batch_size < 1 or steps < 1:
        raise UsageError(f"number {total}, batch size {batch_size} and steps {steps} have to be at least 1.")
    accelerator = make_accelerator(precision=precision, device=device)
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    names = {number: name for name, number in pipeline.labels.items()}
    side = pipeline.default_size
    records = tuple(
        SampleRecord(
            index=i,
            label=chosen[i % len(chosen)],
            class_name=names.get(chosen[i % len(chosen)], str(chosen[i % len(chosen)])),
            seed=seed,
            sampler=type(pipeline.scheduler).__name__,
            steps=steps,
            guidance=guidance,
            height=side if height is None else height,
            width=side if width is None else width,
            model=Path(model).name if Path(model).is_dir() else str(model),
        )
        for i in range(total)
    )
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    own = records[accelerator.process_index :: accelerator.num_processes]
    start = time.perf_counter()
    shown = (console or Console()) if accelerator.is_main_process else None
    with progress_bar(shown, "sampling", len(own)) as advance:
        for begin in range(0, len(own), batch_size):
            batch = own[begin : begin + batch_size]
            with accelerator.autocast():
                images = draw(pipeline, batch)
            for record, image in zip(batch, images, strict=True):
                save_image(directory / f"{record.index:05d}.png", image, record)
            advance(len(batch))
    seconds = time.perf_counter() - start
    accelerator.wait_for_everyone()
    path = None
    if grid and accelerator.is_main_process:
        path = directory / "grid.png"
        written = [Image.open(directory / f"{record.index:05d}.png") for record in records]
        with replaced(path) as part:
            draw_grid(written, records, len(chosen)).save(part, format="PNG")
    return Samples(directory, records, path, seconds, accelerator.is_main_process)


def draw(pipeline: Any, records: Sequence[SampleRecord]) -> list[Image.Image]:
    """The images of some records, each from its own noise."""
    # On the CPU, so that the noise is the same wherever the model runs.
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


def save_image(path: Path, image: Image.Image, record: SampleRecord) -> None:
    """Write a PNG with the record in its text, in one step."""
    info = PngInfo()
    info.add_text(METADATA, json.dumps(asdict(record)))
    with replaced(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def draw_grid(images: Sequence[Image.Image], records: Sequence[SampleRecord], classes: int) -> Image.Image:
    """One image of all: a row for each class with its name, or, of one class, about a square.

    Args:
        images: In the order of the records.
        records: Their origins; class i of the first ``classes`` comes again after as many.
        classes: How many classes take turns.
    """
    width, height = images[0].size
    scale = max(1, math.ceil(48 / max(width, height)))
    width, height = width * scale, height * scale
    gap, many = max(2, width // 24), classes > 1
    columns = math.ceil(len(images) / classes) if many else math.ceil(math.sqrt(len(images)))
    rows = min(classes, len(images)) if many else math.ceil(len(images) / columns)
    names = [record.class_name for record in records[:rows]] if many else []
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = gap + (max(int(probe.textlength(name)) for name in names) + 2 * gap if names else 0)
    sheet = Image.new("RGB", (margin + columns * (width + gap), gap + rows * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        pen.text((gap, gap + row * (height + gap) + height // 2), name, fill=(60, 60, 70), anchor="lm")
    for i, image in enumerate(images):
        row, column = (i % classes, i // classes) if many else divmod(i, columns)
        shown = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(shown, (margin + column * (width + gap), gap + row * (height + gap)))
    return sheet
