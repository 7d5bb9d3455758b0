"""Sampling images from text: a :class:`SampleRequest` becomes PNG files in four steps.

``resolve`` loads the model, mounts the adapter, encodes the prompts and plans the stages; ``estimate`` predicts memory
and time, and refuses what does not fit; ``draw`` denoises and decodes the missing images; ``write`` saves them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from gspn.diffusers.timesteps import set_timesteps

from ...._console import default_console
from ...._errors import UsageError
from ...._locks import DirectoryLock
from ...core.devices import Processes, distributed_context
from ...diffusion.digests import fingerprint
from ...diffusion.images import ImageRecord, is_sampled, save_png
from ...diffusion.schedulers import check_chain, named_scheduler
from ..conditioning import Conditioning, encode_nothing, encode_prompts
from ..decoding import TILED_FROM, shared_tiles, tiles, to_images, to_pixels
from ..pipelines import PIPELINES, load_adapter, load_pipeline
from .denoising import GuidanceInputs
from .estimate import (
    Estimate,
    base_flops,
    check_memory,
    estimate_memory,
    estimate_times,
    free_memory,
    memory_remedies,
    model_bytes,
)
from .offload import MODELS, OFFLOADS, SKIPS, offloaded_skips
from .progressive_upscaling import Stage, UpscalingConfig, plan_stages, segments_beyond, stage_sizes, trained_size
from .stage_runner import RunProgress, StageCache, StageRunner, read_settings
from .unet_by_rows import check_rows

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of the weights."""

_AUTO_OFFLOAD_SHARE = 0.8  # of free memory: where the weights take more, `auto` offloads models


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A request for images.

    Image i has prompt i modulo their number. Its noise is drawn on the CPU and depends on the seed and i alone: the
    batch size changes nothing but rounding. Under ``torchrun`` each process draws every N-th batch, with the files of
    one process; with ``shard_image`` all draw every image together, each some rows of it.

    Attributes:
        model: A directory, a shipped name or a hub id (:func:`~gspn.tasks.text_to_image.pipelines.load_pipeline`), or
            a pipeline, which is moved to the device.
        prompts: At least one.
        output: The directory of the images, ``00000.png`` and on.
        adapter: A name as for :func:`~gspn.tasks.text_to_image.pipelines.load_adapter`, or a ``GSPNAdapter``; mounted
            for the run. None for the pipeline's own attention.
        negative: The negative prompt; by default the pipeline's own empty conditioning.
        number: Images of each prompt.
        height: In pixels, a multiple of the VAE's factor; the trained size by default.
        width: In pixels, a multiple of the VAE's factor; the trained size by default.
        steps: Denoising steps from pure noise.
        guidance: Guidance scale; 1 disables it. GSPN's paper uses 7.
        scheduler: One of :data:`~gspn.tasks.diffusion.schedulers.SCHEDULERS`, or ``"auto"``.
        seed: Seed of the noise.
        batch_size: Images in a batch.
        upscale: Options of progressive upscaling; None to draw in a single stage.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``, the dtype of the weights; by default fp32, or that of a
            pipeline that was passed. Latents stay in float32.
        device: ``"auto"``, a GPU if there is one, or ``"cpu"``.
        tiling: Whether the VAE works in tiles: ``"on"``, ``"off"``, or ``"auto"``, above 1536 x 1536 pixels.
        offload: What to keep in host memory: ``"none"``, ``"model"``, ``"activations"``, ``"all"``, or ``"auto"``, what
            does not fit.
        shard_image: Split each image by rows over the processes of ``torchrun``; for a model with an adapter.
        split_guidance: Call the UNet twice a step instead of once with twice the batch; None: if it does not fit else.
        check: Estimate time and memory first, and refuse what does not fit.
        estimate_only: Draw nothing.

    Raises:
        UsageError: A value is unknown or out of range.
    """

    model: Any
    prompts: tuple[str, ...]
    output: Path
    adapter: Any = None
    negative: str | None = None
    number: int = 1
    height: int | None = None
    width: int | None = None
    steps: int = 30
    guidance: float = 5.0
    scheduler: str = "auto"
    seed: int = 0
    batch_size: int = 1
    upscale: UpscalingConfig | None = None
    precision: str | None = None
    device: str = "auto"
    tiling: str = "auto"
    offload: str = "none"
    shard_image: bool = False
    split_guidance: bool | None = None
    check: bool = True
    estimate_only: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("there is no prompt; give at least one.")
        if min(self.number, self.steps, self.batch_size) < 1:
            raise UsageError(
                f"number {self.number}, batch size {self.batch_size} and steps {self.steps} have to be at least 1."
            )
        if not 0 <= self.guidance < math.inf:
            raise UsageError(f"guidance {self.guidance} has to be 0 or more; 1 disables it.")
        for name, choices in (
            ("device", ("auto", "cpu")), ("precision", (*PRECISIONS, None)), ("tiling", ("auto", "on", "off")),
            ("offload", OFFLOADS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"{name} {value!r} is unknown; use one of {', '.join(filter(None, choices))}.")


@dataclass(frozen=True, kw_only=True)
class CaptionRecord(ImageRecord):
    """How an image was sampled from its prompt; written into its file."""

    prompt: str
    negative: str | None
    pipeline: str
    adapter: str | None
    precision: str
    stages: tuple[dict[str, Any], ...]
    upscaling: dict[str, Any] | None
    tiled: bool


@dataclass(frozen=True)
class RunPlan:
    """A request resolved for its model: the pipeline is ready to run, and each stage uses a copy of the scheduler."""

    request: SampleRequest
    pipeline: Any
    scheduler: Any
    processes: Processes
    """Those that share the images, or with ``shard_image`` the rows of each."""
    precision: str
    stages: tuple[Stage, ...]
    text: Conditioning
    negative: Conditioning | None
    """Of one image; None without guidance."""
    tiled: bool
    offload: str
    """One of :data:`~gspn.tasks.text_to_image.sample.offload.OFFLOADS`."""
    split_guidance: bool | None
    """As in the request; None until :func:`~.estimate.estimate_memory` decides."""
    segments: Mapping[str, int]
    """The lines after which each mixer's scans restart beyond the first stage, by the mixer's name."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    @property
    def writes(self) -> bool:
        """Whether this process writes the images that it draws; of those that share each image, the first one does."""
        return self.processes.is_main or not self.request.shard_image

    def all_agree(self, fact: bool) -> bool:
        """Whether a fact is true in all processes that draw an image."""
        return all(self.processes.gather(fact)) if self.request.shard_image else fact

    @property
    def factor(self) -> int:
        """Pixels per latent pixel."""
        return self.pipeline.vae_scale_factor

    @property
    def images(self) -> int:
        """The number of images."""
        return self.request.number * len(self.request.prompts)

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        return min(self.request.batch_size, self.images)

    def guidance_inputs(self, indices: Sequence[int]) -> GuidanceInputs:
        """The conditioning of the images with these indices."""
        rows = torch.tensor([index % len(self.request.prompts) for index in indices])
        negative = self.negative and self.negative[torch.zeros_like(rows)].to(self.device)
        text = self.text[rows].to(self.device)
        return GuidanceInputs(text, negative, self.request.guidance, bool(self.split_guidance))

    def records(self) -> tuple[CaptionRecord, ...]:
        """The record of every image, in order."""
        request, last = self.request, self.stages[-1]
        return tuple(
            CaptionRecord(
                index=i, prompt=request.prompts[i % len(request.prompts)], negative=request.negative, seed=request.seed,
                width=last.width, height=last.height, steps=request.steps, guidance=request.guidance,
                scheduler=type(self.scheduler).__name__, pipeline=_name(request.model),
                adapter=None if request.adapter is None else _name(request.adapter), precision=self.precision,
                stages=tuple(asdict(stage) for stage in self.stages),
                upscaling=None if request.upscale is None else asdict(request.upscale), tiled=self.tiled,
            )
            for i in range(self.images)
        )  # fmt: skip

    def open_cache(self) -> StageCache | None:
        """The cache of finished stages, for progressive upscaling.

        Raises:
            UsageError: The output holds stages of a run with other settings or weights.
        """
        request, first = self.request, self.records()[0]
        if request.upscale is None or request.estimate_only:
            return None
        # Everything that the images depend on. The adapter's weights are among the UNet's.
        shared = ("negative", "seed", "width", "height", "steps", "guidance", "scheduler", "pipeline", "adapter")
        settings = {name: getattr(first, name) for name in (*shared, "precision", "tiled")} | asdict(request.upscale)
        # Keys with an underscore do not change images, and diffusers' _use_default_values has no fixed order.
        options = {key: str(value) for key, value in sorted(self.scheduler.config.items()) if not key.startswith("_")}
        settings |= {
            "prompts": request.prompts, "number": request.number, "batch_size": self.batch_size,
            "device": self.device.type, "split_guidance": bool(self.split_guidance),
            "scheduler_options": options,
            "weights": fingerprint(self.pipeline.unet) + fingerprint(self.pipeline.vae),
        }  # fmt: skip
        if request.shard_image:
            settings["shard_image"] = self.processes.count  # which changes rounding
        # The first process begins it for all.
        cache = StageCache(request.output, settings) if self.processes.is_main else None
        self.processes.wait()
        return cache or StageCache(request.output, settings)


@dataclass(frozen=True)
class SampleResult:
    """The result of :func:`sample`."""

    directory: Path
    records: tuple[CaptionRecord, ...]
    """Those of all images, in order; empty where only an estimate was requested."""
    drawn: int
    """The number of images that this call drew, in all processes; the others were finished before."""
    seconds: float
    estimate: Estimate | None
    """None where nothing was checked."""
    is_main: bool = True
    """Whether this is the process that prints."""


def sample(
    model: Any, prompts: str | Sequence[str], *, output: str | Path, upscale: bool | UpscalingConfig = False,
    console: Console | None = None, **options: Any,
) -> SampleResult:  # fmt: skip
    """Generate images from text, as PNG files that record their origin.

    With ``upscale``, images above the trained size are drawn in stages
    (:func:`~.progressive_upscaling.plan_stages`). Finished stages are kept in ``stages`` in the output directory: an
    interrupted run that is called again with the same arguments continues after the last finished stage and ends with
    the same images, bit for bit. Finished images are not drawn again.

    Args:
        model: As in :class:`SampleRequest`.
        prompts: One or more.
        output: The directory of the images.
        upscale: Whether to upscale progressively, or its options.
        console: Where to print; standard output by default.
        **options: Further fields of :class:`SampleRequest`.

    Raises:
        UsageError: The request cannot be met.
        MissingExtraError: A package is not installed.

    Example:
        >>> from gspn.tasks.text_to_image.sample import sample
        >>> sample("runs/base", "a red bicycle", adapter="runs/adapter", output="/tmp/bicycle", width=2048, height=1024,
        ...        upscale=True)  # doctest: +SKIP
    """
    request = SampleRequest(
        model=model, prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts), output=Path(output),
        upscale=(UpscalingConfig() if upscale is True else upscale) or None, **options,
    )  # fmt: skip
    return run(request, console or default_console())


def run(request: SampleRequest, console: Console) -> SampleResult:
    """Carry out a request: resolve it, estimate it, draw the images and write them."""
    with distributed_context(), contextlib.ExitStack() as stack:
        processes = Processes.join(request.device)
        if not processes.is_main:
            console = Console(quiet=True)
        elif not request.estimate_only:
            stack.enter_context(DirectoryLock(request.output))  # one process holds the directory for all
        plan = resolve(request, processes, stack)
        plan, cache, estimated = estimate(plan, stack, console)
        if request.estimate_only:
            return SampleResult(request.output, (), 0, 0.0, estimated, processes.is_main)
        if request.shard_image:
            stack.enter_context(shared_tiles(plan.pipeline.vae, processes))
        records, start = plan.records(), time.perf_counter()
        try:
            drawn = write(request.output, draw(plan, records, cache, console))
        except torch.OutOfMemoryError as error:
            remedies = ", ".join(memory_remedies(plan, estimated))
            raise UsageError(f"out of memory: {str(error).splitlines()[0]} Try: {remedies}.") from None
        drawn = sum(processes.gather(drawn))
    return SampleResult(request.output, records, drawn, time.perf_counter() - start, estimated, processes.is_main)


def resolve(request: SampleRequest, processes: Processes, stack: contextlib.ExitStack) -> RunPlan:
    """Load the model, mount the adapter, encode the prompts and plan the stages.

    All changes to the pipeline are undone when ``stack`` closes.
    """
    device = processes.device
    if request.shard_image and processes.count == 1:
        raise UsageError(
            "--shard-image splits an image over several processes, and this is one; start them with torchrun "
            "--nproc-per-node N --no-python gspn t2i sample ... --shard-image, or leave it out."
        )
    _check_offload(request.offload, device)
    before = read_settings(request.output) or {}
    if before and request.upscale is None:
        raise UsageError(f"{str(request.output)!r} holds upscaled images; use another output, or add --upscale.")
    pipeline, precision = _open_pipeline(request.model, request.precision)
    adapter = load_adapter(request.adapter) if isinstance(request.adapter, str | Path) else request.adapter
    check_chain(pipeline.scheduler)
    scheduler = named_scheduler(request.scheduler, pipeline.scheduler, auto="dpm++")  # which starts at any step
    set_timesteps(scheduler, request.steps)  # refuses too many, before anything is drawn
    factor = pipeline.vae_scale_factor
    trained = trained_size(pipeline.unet, factor)
    height, width = request.height or trained[0], request.width or trained[1]
    stages = plan_stages(
        height, width, area=math.prod(trained), multiple=factor, steps=request.steps, upscaling=request.upscale
    )
    tiled = request.tiling == "on" or (request.tiling == "auto" and height * width > TILED_FROM)

    for model in (pipeline.unet, pipeline.vae):  # a trainer that samples leaves them in training mode
        stack.callback(model.train, model.training)
        model.eval()
    offload = _place(pipeline, processes, request.offload)
    if adapter is not None and adapter.mounted_on is not pipeline.unet:
        try:
            adapter.mount(pipeline.unet)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"the adapter cannot be mounted: {error}") from None
        stack.callback(adapter.train, adapter.training)
        stack.callback(adapter.unmount)
        pipeline.unet.eval()
    stack.enter_context(tiles(pipeline.vae, tiled))
    if request.shard_image:
        dilated = request.upscale is not None and request.upscale.dilated
        check_rows(pipeline.unet, stages, factor, processes.count, dilated=dilated)
    text, negative = encode_prompts(pipeline, request.prompts), None
    if request.guidance != 1:
        prompt = request.negative
        negative = encode_nothing(pipeline) if prompt is None else encode_prompts(pipeline, [prompt])
    segments = {}
    if request.upscale is not None and len(stages) > 1:
        segments = segments_beyond(
            pipeline.unet, text, height=stages[0].height, width=stages[0].width, factor=factor,
            segment_scans=request.upscale.segment_scans,
        )  # fmt: skip
    # A run that continues keeps what it decided, however much memory is free now.
    split = before.get("split_guidance") if request.split_guidance is None else request.split_guidance
    processes.wait()  # all have looked before one writes
    return RunPlan(
        request, pipeline, scheduler, processes, precision, stages, text, negative, tiled, offload, split, segments
    )


def estimate(
    plan: RunPlan, stack: contextlib.ExitStack, console: Console
) -> tuple[RunPlan, StageCache | None, Estimate | None]:
    """Decide what the plan leaves open, refuse what cannot be run, and print the estimate.

    The offloading of the returned plan is in effect until ``stack`` closes.
    """
    request, estimated, small, flops = plan.request, None, (0, 0), (0, 0)
    if request.check or request.estimate_only:
        plan, estimated = estimate_memory(plan)
        if not request.estimate_only:
            check_memory(estimated, plan)
        last, area = plan.stages[-1], math.prod(trained_size(plan.pipeline.unet, plan.factor))
        small = stage_sizes(last.height, last.width, area, plan.factor)[0]
        flops = base_flops(plan, *small)
    # Opened before anything that takes long, because it refuses other settings.
    cache = plan.open_cache()
    if plan.offload in MODELS:
        plan.pipeline.enable_model_cpu_offload(device=plan.device)
        stack.callback(plan.pipeline.to, "cpu")
        stack.callback(plan.pipeline.remove_all_hooks)
    if estimated is not None and plan.processes.is_main:
        estimated = estimate_times(estimated, plan, *small, flops)
        console.print(estimated.table())
    if plan.offload in SKIPS and not request.estimate_only:
        stack.enter_context(offloaded_skips(plan.pipeline.unet, storage="cpu"))
    return plan, cache, estimated


def draw(
    plan: RunPlan, records: Sequence[CaptionRecord], cache: StageCache | None, console: Console
) -> Iterator[tuple[CaptionRecord, Image.Image]]:
    """Draw the images that are missing, of this process's batches; with a cache, finished ones are left as they are."""
    runner, directory = StageRunner(plan, cache), plan.request.output
    batches = [records[i : i + plan.batch_size] for i in range(0, len(records), plan.batch_size)]
    if not plan.request.shard_image:
        batches = plan.processes.share(batches)
    steps = sum(stage.steps for stage in plan.stages)
    with RunProgress(console, len(plan.stages), steps * len(batches)) as progress:
        for batch in batches:
            missing = [one for one in batch if cache is None or not plan.all_agree(is_sampled(directory, one))]
            if not missing:
                progress.steps_done(steps)
                continue
            # The whole batch is drawn, even for a few missing images: rounding depends on the batch.
            latents = runner.draw([one.index for one in batch], progress)
            for one in missing:
                if not plan.writes and not plan.tiled:
                    continue  # nobody needs this process to decode
                progress.describe(f"image {one.index}: decoding")
                pixels = to_pixels(plan.pipeline, latents[[one.index - batch[0].index]])
                if plan.writes:
                    yield one, to_images(plan.pipeline, pixels)[0]


def write(directory: Path, images: Iterable[tuple[CaptionRecord, Image.Image]]) -> int:
    """Save images as PNG files with their records, and return their number."""
    count = 0
    for record, image in images:
        save_png(record.path(directory), image, record)
        count += 1
    return count


def _name(source: Any) -> str:
    """The name of a model or adapter, for records."""
    if isinstance(source, str | Path):
        return str(source)
    name = getattr(source, "name_or_path", "")  # a pipeline's
    name = name or getattr(source, "config", {}).get("_name_or_path", "")  # a model's
    return str(name or type(source).__name__)


def _open_pipeline(source: Any, precision: str | None) -> tuple[Any, str]:
    """The pipeline and its precision."""
    if isinstance(source, str | Path):
        precision = precision or "fp32"
        return load_pipeline(source, dtype=PRECISIONS[precision]), precision
    if type(source).__name__ not in PIPELINES:
        raise UsageError(
            f"a {type(source).__name__} is not a supported text-to-image pipeline; pass one of {', '.join(PIPELINES)}."
        )
    if getattr(source, "_all_hooks", None):
        raise UsageError("this pipeline's models are offloaded; call its remove_all_hooks(), and pass offload='model'.")
    own = {dtype: name for name, dtype in PRECISIONS.items()}.get(source.unet.dtype)
    if own is None or precision not in (None, own):
        raise UsageError(
            f"precision {precision!r}, and the pipeline's is {source.unet.dtype}; convert it with pipeline.to(dtype), "
            "or leave precision out."
        )
    return source, own


def _check_offload(offload: str, device: torch.device) -> None:
    if device.type == "cpu" and offload in {*MODELS, *SKIPS}:
        raise UsageError(
            f"offload {offload!r}: the run is on the CPU, which has nothing to offload to; use none, or choose a GPU."
        )


def _place(pipeline: Any, processes: Processes, offload: str) -> str:
    """Move a pipeline to its device, unless its models are offloaded; returns what is offloaded."""
    device = processes.device
    if offload in MODELS:
        return offload
    if device.type != "cpu" and offload == "auto":
        models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
        if sum(map(model_bytes, models)) > _AUTO_OFFLOAD_SHARE * min(processes.gather(free_memory(device))):
            pipeline.to("cpu")
            return "model"
    try:
        pipeline.to(device)
    except torch.OutOfMemoryError:
        raise UsageError(
            f"the weights do not fit on {device}: use --precision bf16, --offload model, or --device cpu."
        ) from None
    return offload
