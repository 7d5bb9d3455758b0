"""Generating images from text: :func:`sample`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...core.errors import UsageError
from ...diffusion.digests import fingerprint
from ...diffusion.images import ImageRecord, is_sampled, save_png
from ..conditioning import Conditioning, encode_nothing, encode_prompts
from ..decoding import TILED_FROM, tiles
from ..denoising import Guide, named_scheduler
from ..pipelines import PIPELINES, load_adapter, load_pipeline
from .estimate import Estimate, base_operations, estimate_stages, with_times
from .offload import (
    MODELS,
    SKIPS,
    check_offload,
    drawing_weights,
    free_memory,
    moved,
    offloaded_models,
    offloaded_skips,
)
from .progressive_upscaling import LadderConfig, plan_stages, trained_area
from .segments import lines_of
from .stage_cache import LadderState, read_settings
from .stage_runner import Drawing, RunProgress

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the weights."""

TILINGS = ("auto", "on", "off")
"""Whether the VAE works in tiles; auto: above :data:`~gspn.tasks.text_to_image.decoding.TILED_FROM` pixels."""


@dataclass(frozen=True, kw_only=True)
class CaptionRecord(ImageRecord):
    """How an image was sampled from its prompt; written into its file."""

    prompt: str
    negative: str | None
    pipeline: str
    adapter: str | None
    precision: str
    stages: tuple[dict[str, Any], ...]
    ladder: dict[str, Any] | None
    tiled: bool


@dataclass(frozen=True)
class SampleResult:
    """What :func:`sample` wrote.

    Attributes:
        directory: Of the images.
        records: Of all of them, in order; none where only an estimate was asked for.
        drawn: How many were drawn by this call; the others were there.
        seconds: Spent drawing.
        estimate: What was expected, or None where nothing was checked.
    """

    directory: Path
    records: tuple[CaptionRecord, ...]
    drawn: int
    seconds: float
    estimate: Estimate | None


def sample(
    pipeline: Any,
    prompts: str | Sequence[str],
    *,
    output: str | Path,
    adapter: Any = None,
    negative: str | None = None,
    number: int = 1,
    height: int | None = None,
    width: int | None = None,
    steps: int = 30,
    guidance: float = 5.0,
    scheduler: str = "auto",
    seed: int = 0,
    batch_size: int = 1,
    ladder: bool | LadderConfig = False,
    precision: str | None = None,
    device: str = "auto",
    tiling: str = "auto",
    offload: str = "none",
    split_guidance: bool | None = None,
    check: bool = True,
    estimate_only: bool = False,
    console: Console | None = None,
) -> SampleResult:
    """Generate images from text, as PNG files with their origin in them.

    Image i is of prompt i modulo their number. Its noise is a function of the seed and i alone, drawn on the CPU:
    the batch size does not change it, beyond rounding.

    With a ladder, images above the size of the training are drawn in stages
    (:func:`~.progressive_upscaling.plan_stages`). Finished stages are kept in the output's directory
    ``ladder``: called again with the same arguments after it was stopped, it goes on after the last whole stage and
    ends with the same images, bit for bit. Images that are there are not drawn again.

    Args:
        pipeline: What :func:`~gspn.tasks.text_to_image.pipelines.load_pipeline` finds, or a pipeline, which is then
            moved to the device.
        prompts: One or more.
        output: A directory; images are ``00000.png`` and on.
        adapter: What :func:`~gspn.tasks.text_to_image.pipelines.load_adapter` finds, or a ``GSPNAdapter``: mounted
            while this runs. None for the pipeline's own attention.
        negative: What guidance leads away from; by default what the pipeline takes for no text.
        number: Images of each prompt.
        height: In pixels, a multiple of the VAE's factor; by default that of the training.
        width: Likewise.
        steps: Of the whole chain.
        guidance: 1: none. GSPN's images were drawn with 7.
        scheduler: One of :data:`~gspn.tasks.text_to_image.denoising.SCHEDULERS`, or ``"auto"``.
        seed: Of the noise.
        batch_size: Images at a time.
        ladder: Whether to draw in stages, or how.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``, of the weights; by default fp32, or as a pipeline given has
            it. Latents stay in float32.
        device: ``"auto"`` takes a GPU if there is one, ``"cpu"`` none.
        tiling: Of the VAE: ``"on"``, ``"off"``, or ``"auto"``, above 1536 x 1536 pixels.
        offload: What waits in host memory: ``"none"``, ``"model"``, ``"activations"``, ``"all"`` for both, or
            ``"auto"``, what does not fit.
        split_guidance: Call the UNet twice a step instead of with twice the batch; None: where it does not fit else.
        check: Estimate time and memory first, and refuse what does not fit.
        estimate_only: Draw nothing.
        console: Where to print; standard output by default.

    Returns:
        Where everything is.

    Raises:
        UsageError: a request that cannot be met.
        MissingExtraError: a package is not installed.

    Example:
        >>> from gspn.tasks.text_to_image.sample.sampling import sample
        >>> sample("runs/base", "a red bicycle", adapter="runs/adapter", output="/tmp/bicycle", width=2048, height=1024,
        ...        ladder=True)  # doctest: +SKIP
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    directory, console, where = Path(output), console or Console(), _device(device)
    _check_request(prompts, number=number, steps=steps, batch_size=batch_size, guidance=guidance, tiling=tiling)
    check_offload(offload, where)
    before = read_settings(directory) or {}
    if before and not ladder:
        raise UsageError(f"{str(output)!r} holds a ladder's images; give another output, or draw with a ladder.")
    names = {"pipeline": _name(pipeline), "adapter": None if adapter is None else _name(adapter)}
    pipeline, precision = _opened(pipeline, precision)
    adapter = load_adapter(adapter) if isinstance(adapter, str | Path) else adapter
    chain = named_scheduler(scheduler, pipeline.scheduler)
    if steps > chain.config.num_train_timesteps:
        raise UsageError(f"{steps} steps are more than the {chain.config.num_train_timesteps} of the training.")
    config = None if ladder is False else LadderConfig() if ladder is True else ladder
    factor, area = pipeline.vae_scale_factor, trained_area(pipeline.unet, pipeline.vae_scale_factor)
    height, width = _sides(height, width, pipeline)
    stages = plan_stages(height, width, area=area, multiple=factor, steps=steps, ladder=config)
    tiled = tiling == "on" or (tiling == "auto" and height * width > TILED_FROM)
    total = number * len(prompts)
    batch_size = min(batch_size, total)
    split = before.get("split_guidance") if split_guidance is None else split_guidance
    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(pipeline))
        offload = moved(pipeline, where, offload)
        if adapter is not None and adapter.mounted_on is not pipeline.unet:
            stack.enter_context(_mounted(adapter, pipeline.unet))
        stack.enter_context(tiles(pipeline.vae, tiled))
        text, nothing = _encoded(pipeline, prompts, negative, guidance)
        estimate = small = None
        operations = (0, 0)
        if check or estimate_only:

            def expected(split: bool, skips: bool) -> Estimate:
                counted = estimate_stages(
                    pipeline, stages, text, ladder=config, images=total, batch=batch_size, guided=nothing is not None,
                    split=split, tiled=tiled, offload=skips, device=where,
                    extra=drawing_weights(pipeline) if offload in MODELS else 0,
                )  # fmt: skip
                return Estimate(counted, free_memory(where), str(where))

            estimate, split, offload = _chosen(expected, split, nothing is not None, offload, where)
            if not estimate_only:
                estimate.check(_remedies(estimate, precision, tiled, offload, where))
            small = plan_stages(height, width, area=area, multiple=factor, steps=steps, ladder=LadderConfig((1.0,)))[0]
            operations = base_operations(pipeline, text, height=small.height, width=small.width, device=where)
        split = bool(split)
        # What the images depend on; what is only how they are come by is left out.
        settings: dict[str, Any] = {
            **names, "prompts": prompts, "negative": negative, "number": number, "height": height, "width": width,
            "steps": steps, "guidance": guidance, "scheduler": type(chain).__name__, "seed": seed,
            "batch_size": batch_size, "precision": precision, "device": where.type, "tiled": tiled,
            "split_guidance": split, **({} if config is None else asdict(config)),
            "scheduler_options": {key: str(value) for key, value in sorted(chain.config.items())},
        }  # fmt: skip
        if config is not None:  # the adapter's weights are among the UNet's
            settings["weights"] = fingerprint(pipeline.unet) + fingerprint(pipeline.vae)
        # What cannot go on is refused before anything takes long.
        state = None if config is None or estimate_only else LadderState(directory, settings)
        lines = {}
        if config is not None and config.restart and len(stages) > 1:  # before hooks that move weights
            first = stages[0]
            lines = lines_of(pipeline.unet, text, height=first.height, width=first.width, factor=factor)
        if offload in MODELS:
            stack.enter_context(offloaded_models(pipeline, where))
        text, nothing = text.to(where), nothing and nothing.to(where)
        if estimate is not None and small is not None:
            timed = with_times(
                estimate.stages, pipeline, text, height=small.height, width=small.width, operations=operations,
                device=where, grow=offload not in MODELS,
            )  # fmt: skip
            estimate = replace(estimate, stages=timed)
            console.print(estimate.table())
        if estimate_only:
            return SampleResult(directory, (), 0, 0.0, estimate)
        if offload in SKIPS:
            stack.enter_context(offloaded_skips(pipeline.unet, storage="cpu"))
        drawing = Drawing(pipeline, chain, stages, config, where, steps=steps, seed=seed, state=state, lines=lines)
        records = tuple(
            CaptionRecord(
                index=i, prompt=prompts[i % len(prompts)], negative=negative, seed=seed, width=width, height=height,
                steps=steps, guidance=guidance, scheduler=type(chain).__name__, **names, precision=precision,
                stages=tuple(asdict(stage) for stage in stages),
                ladder=None if config is None else asdict(config), tiled=tiled,
            )
            for i in range(total)
        )  # fmt: skip
        start = time.perf_counter()
        try:
            drawn = _draw_missing(
                drawing, directory, records, Guide(text, nothing, guidance, split), batch_size, console
            )
        except torch.OutOfMemoryError as error:
            remedies = ", ".join(_remedies(estimate, precision, tiled, offload, where))
            raise UsageError(f"memory ran out: {str(error).splitlines()[0]} Try: {remedies}.") from None
    return SampleResult(directory, records, drawn, time.perf_counter() - start, estimate)


def _draw_missing(
    drawing: Drawing, directory: Path, records: Sequence[CaptionRecord], guide: Guide, batch_size: int, console: Console
) -> int:
    """Draw what is not there; ``guide`` is of all prompts. Returns how many were drawn."""
    prompts, drawn = len(guide.text), 0
    with RunProgress(console, drawing.stages, drawing.steps * math.ceil(len(records) / batch_size)) as progress:
        for begin in range(0, len(records), batch_size):
            batch = records[begin : begin + batch_size]
            missing = [one for one in batch if not drawing.resumes or not is_sampled(directory, one)]
            if not missing:
                progress.passed(drawing.steps)
                continue
            # The whole batch even where some of its images are there: the others' rounding depends on it.
            rows = torch.tensor([one.index % prompts for one in batch])
            own = replace(
                guide, text=guide.text[rows], negative=guide.negative and guide.negative[torch.zeros_like(rows)]
            )
            latents = drawing.draw([one.index for one in batch], own, progress)
            for one in missing:
                progress.told(f"image {one.index}: decoding")
                save_png(one.path(directory), drawing.decode(latents[one.index - begin]), one)
                drawn += 1
    return drawn


def _check_request(
    prompts: list[str], *, number: int, steps: int, batch_size: int, guidance: float, tiling: str
) -> None:
    if not prompts:
        raise UsageError("there is no prompt; give one at least.")
    if min(number, steps, batch_size) < 1:
        raise UsageError(f"number {number}, batch size {batch_size} and steps {steps} have to be at least 1.")
    if not 0 <= guidance < math.inf:
        raise UsageError(f"guidance {guidance} has to be 0 or more; 1 is none.")
    if tiling not in TILINGS:
        raise UsageError(f"tiling {tiling!r} is unknown; use one of {', '.join(TILINGS)}.")


def _device(device: str) -> torch.device:
    if device not in ("auto", "cpu"):
        raise UsageError(f"device {device!r} is unknown; use auto or cpu.")
    found = torch.accelerator.current_accelerator(check_available=True) if device == "auto" else None
    return torch.device("cpu") if found is None else found


def _name(source: Any) -> str:
    if isinstance(source, str | Path):
        return str(source)
    found = getattr(source, "name_or_path", "")  # a pipeline's
    found = found or getattr(source, "config", {}).get("_name_or_path", "")  # a model's
    return str(found or type(source).__name__)


def _opened(source: Any, precision: str | None) -> tuple[Any, str]:
    """The pipeline, and its precision."""
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}.")
    if isinstance(source, str | Path):
        precision = precision or "fp32"
        return load_pipeline(source, dtype=PRECISIONS[precision]), precision
    if type(source).__name__ not in PIPELINES:
        raise UsageError(f"a {type(source).__name__} draws nothing from text here; pass one of {', '.join(PIPELINES)}.")
    if getattr(source, "_all_hooks", None):
        raise UsageError("this pipeline's models are offloaded; call its remove_all_hooks(), and pass offload='model'.")
    own = {dtype: name for name, dtype in PRECISIONS.items()}.get(source.unet.dtype)
    if own is None or precision not in (None, own):
        raise UsageError(
            f"precision {precision!r}, and the pipeline's is {source.unet.dtype}; convert it with pipeline.to(dtype), "
            "or leave precision out."
        )
    return source, own


def _sides(height: int | None, width: int | None, pipeline: Any) -> tuple[int, int]:
    size, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    own = (size, size) if isinstance(size, int) else size
    return height or own[0] * factor, width or own[1] * factor


@contextlib.contextmanager
def _evaluating(pipeline: Any) -> Iterator[None]:
    """Without dropout, whatever a trainer that samples in between left them in."""
    was = [(model, model.training) for model in (pipeline.unet, pipeline.vae)]
    for model, _ in was:
        model.eval()
    try:
        yield
    finally:
        for model, training in was:
            model.train(training)


@contextlib.contextmanager
def _mounted(adapter: Any, unet: Any) -> Iterator[None]:
    try:
        adapter.mount(unet)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"the adapter cannot be mounted: {error}") from None
    training = adapter.training
    unet.eval()
    try:
        yield
    finally:
        adapter.unmount()
        adapter.train(training)


def _encoded(
    pipeline: Any, prompts: list[str], negative: str | None, guidance: float
) -> tuple[Conditioning, Conditioning | None]:
    text = encode_prompts(pipeline, prompts)
    if guidance == 1:
        return text, None
    return text, encode_nothing(pipeline) if negative is None else encode_prompts(pipeline, [negative])


def _chosen(
    expected: Callable[[bool, bool], Estimate], split: bool | None, guided: bool, offload: str, where: torch.device
) -> tuple[Estimate, bool, str]:
    """The first of what may be chosen that fits, else the leanest: its estimate, whether guidance is split, offload."""
    skips = offload in SKIPS
    splits = [bool(split)] if split is not None or not guided else [False, True]
    # Models that wait may have been chosen by `auto` too; they leave it to the caller whether skip tensors do.
    waits = [False, True] if offload == "auto" and where.type != "cpu" else [skips]
    estimate, choice = None, (False, skips)
    for choice in ((one, wait) for wait in waits for one in splits):
        estimate = expected(*choice)
        if estimate.fits:
            break
    if estimate is None:
        raise RuntimeError("there was nothing to choose from")  # both lists have one entry at least
    return estimate, choice[0], "activations" if choice[1] and offload == "auto" else offload


def _remedies(estimate: Estimate | None, precision: str, tiled: bool, offload: str, where: torch.device) -> list[str]:
    """What would take less memory, of what is not done yet."""
    over = [one for one in (estimate.stages if estimate else ()) if one.peak > estimate.available] if estimate else []
    found = ["draw a smaller image (--size)"]
    if not tiled and (not over or any(not one.steps for one in over)):
        found.append("--tiling on")
    if precision == "fp32":
        found.append("--precision bf16")
    if where.type != "cpu" and offload != "all":
        found.append("--offload all" if offload in MODELS else "--offload activations")
    return found
