"""The estimate before a run: operations, peak memory and time of every stage.

The UNet and the VAE run on fake tensors, which have shapes but no data, at the full size; every operation is counted
and every allocation followed. Times scale one real call at the trained size (for small models, at a larger size) by
the ratio of operations.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...._errors import UsageError
from ...diffusion.autoencoder import vae_scale_factor
from ..conditioning import Conditioning, unet_arguments
from ..decoding import tile_sides
from .offload import MODELS, SKIPS, offloaded_skips

if TYPE_CHECKING:
    from .sampling import RunPlan

MARGIN = 1.15
"""Factor on the peak, for kernels' own workspace and fragmentation."""

_LATENT_MAPS = 8  # float32 maps of a stage: latents, noise, the enlarged ones, two predictions, a solver's history
_LONG_CALL = 2.0  # seconds
_SHORT_CALL = 0.1  # seconds
_LARGEST_TIMED = 32  # times the trained area: calls that were too short are timed at sizes up to this
_PIXEL_MAPS = 3  # the decoded image, a copy while it is assembled, and the bytes
_TILE_STRIDE = 0.75  # of a tile's side: diffusers' tiles overlap by a quarter


@dataclass(frozen=True)
class StageEstimate:
    """The estimate of one stage, or of decoding, at a size in pixels."""

    name: str
    height: int
    width: int
    steps: int
    """Denoising steps; 0 for decoding."""
    flops: int
    """Of all calls of one process, as :class:`CallCost` counts them."""
    peak_bytes: int
    """Memory in use beyond what is allocated before the stage."""
    seconds: float | None = None
    """Of all calls; None before they are timed."""


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run: its stages in order, then decoding, and the free bytes on the device."""

    stages: tuple[StageEstimate, ...]
    available: int
    device: str

    @property
    def fits(self) -> bool:
        """Whether every stage fits into the free memory."""
        return all(stage.peak_bytes <= self.available for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """The time of all stages."""
        times = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(times) if len(times) == len(self.stages) else None

    def table(self) -> Table:
        """The estimate as a table for a terminal."""
        title = f"Estimate; {format_bytes(self.available)} free on {self.device}"
        table = Table("stage", title=title, title_justify="left", box=None)
        for heading in ("size", "steps", "operations", "memory", "time"):
            table.add_column(heading, justify="right")
        for stage in self.stages:
            style = "[bold red]" if stage.peak_bytes > self.available else ""
            table.add_row(
                stage.name, f"{stage.width}x{stage.height}", str(stage.steps or ""), f"{stage.flops / 1e12:.3g} T",
                f"{style}{format_bytes(stage.peak_bytes)}",
                "" if stage.seconds is None else format_seconds(stage.seconds),
            )  # fmt: skip
        if self.seconds is not None:
            table.add_row("all", "", "", "", "", format_seconds(self.seconds))
        return table


def estimate_memory(plan: RunPlan) -> tuple[RunPlan, Estimate]:
    """Count the operations and memory of a run, without times, and decide what its plan leaves open.

    Guidance may be split, and with ``offload="auto"`` skip tensors may be offloaded. The first combination that fits
    is taken, else the one that needs least.
    """
    is_open = plan.split_guidance is None and plan.negative is not None
    splits = [False, True] if is_open else [bool(plan.split_guidance)]
    # Offloaded models, which "auto" may have chosen too, leave it to the caller whether skip tensors are offloaded.
    may_offload = plan.offload == "auto" and plan.device.type != "cpu"
    offloads = [plan.offload, "activations"] if may_offload else [plan.offload]

    def attempt(choice: tuple[str, bool]) -> tuple[RunPlan, Estimate]:
        candidate = replace(plan, offload=choice[0], split_guidance=choice[1])
        return candidate, Estimate(estimate_stages(candidate), available, str(plan.device))

    # All processes decide the same, by the least memory; those of one machine share that of the CPU.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if plan.device.type == "cpu" else 1
    available = min(plan.processes.gather(free_memory(plan.device))) // sharing

    *choices, last = itertools.product(offloads, splits)
    return next((one for one in map(attempt, choices) if one[1].fits), None) or attempt(last)


def check_memory(estimate: Estimate, plan: RunPlan) -> None:
    """Refuse a run that does not fit.

    Raises:
        UsageError: A stage needs more than is free.
    """
    worst = max(estimate.stages, key=lambda stage: stage.peak_bytes)
    if worst.peak_bytes > estimate.available:
        raise UsageError(
            f"{worst.name} at {worst.width}x{worst.height} needs about {format_bytes(worst.peak_bytes)}, and "
            f"{format_bytes(estimate.available)} are free on {estimate.device}: "
            f"{', '.join(memory_remedies(plan, estimate))}, or --no-check (check=False) to try nonetheless."
        )


def memory_remedies(plan: RunPlan, estimate: Estimate | None) -> list[str]:
    """The options that would reduce the memory of a run further."""
    over = [one for one in estimate.stages if one.peak_bytes > estimate.available] if estimate else []
    remedies = ["draw a smaller image (--size)"]
    if not plan.tiled and (not over or any(not one.steps for one in over)):
        remedies.append("--tiling on")
    if plan.precision == "fp32":
        remedies.append("--precision bf16")
    if plan.device.type != "cpu" and plan.offload != "all":
        remedies.append("--offload all" if plan.offload in MODELS else "--offload activations")
    return remedies


def estimate_stages(plan: RunPlan) -> tuple[StageEstimate, ...]:
    """Operations and memory of a run's stages and of decoding, without times, in each process.

    Where processes share the rows of an image, each has its part of the UNet's maps, all latents, and in tiles its part
    of the VAE's operations.
    """
    unet, vae, upscaling, factor = plan.pipeline.unet, plan.pipeline.vae, plan.request.upscale, plan.factor
    guided, split = plan.negative is not None, plan.split_guidance
    calls, batch = (2 if guided and split else 1), plan.batch_size * (2 if guided and not split else 1)
    # Offloaded models return to the device while they compute, so their weights count as well.
    weights = model_bytes(unet) + model_bytes(vae) if plan.offload in MODELS else 0

    rows = plan.processes.count if plan.request.shard_image else 1
    batches = math.ceil(plan.images / plan.batch_size / (plan.processes.count if rows == 1 else 1))
    images = min(plan.images, batches * plan.batch_size)
    vae_share = rows if plan.tiled else 1
    cost = partial(unet_cost, unet, plan.text, factor=factor, device=plan.device, offload=plan.offload in SKIPS)
    decoding = partial(decoder_cost, vae, tiled=plan.tiled, device=plan.device)
    estimates, count = [], len(plan.stages)
    for number, stage in enumerate(plan.stages, start=1):
        one = cost(height=stage.height, width=stage.width, batch=batch)
        flops, peak = one.flops, one.peak_bytes
        if upscaling is not None and upscaling.dilated and stage.dilation > 1:
            s = stage.dilation
            h, w = (math.ceil(side / factor / s) * factor for side in (stage.height, stage.width))
            sub_maps = cost(height=h, width=w, batch=batch * s * s)
            flops, peak = flops + sub_maps.flops, max(peak, sub_maps.peak_bytes)
        maps = 4 * _LATENT_MAPS * plan.batch_size * unet.config.in_channels * stage.height * stage.width // factor**2
        flops, peak = flops * calls * stage.steps * batches // rows, peak // rows + maps
        if upscaling is not None and upscaling.space == "pixels" and number > 1:
            # Encoding is counted as decoding, which is slightly more.
            for size in (plan.stages[number - 2], stage):
                vae_cost = decoding(height=size.height, width=size.width)
                flops, peak = flops + vae_cost.flops * images // vae_share, max(peak, vae_cost.peak_bytes + maps)
        name = f"stage {number} of {count}" if count > 1 else "denoising"
        peak = int(peak * MARGIN) + weights
        estimates.append(StageEstimate(name, stage.height, stage.width, stage.steps, flops, peak))
    last = plan.stages[-1]
    vae_cost = decoding(height=last.height, width=last.width)
    peak = int((vae_cost.peak_bytes + _PIXEL_MAPS * 4 * 3 * last.height * last.width) * MARGIN) + weights
    return (
        *estimates,
        StageEstimate("decoding", last.height, last.width, 0, vae_cost.flops * images // vae_share, peak),
    )


def base_flops(plan: RunPlan, height: int, width: int) -> tuple[int, int]:
    """Operations of the calls that :func:`estimate_times` times: one of the UNet and one of the decoder."""
    options: dict[str, Any] = {"height": height, "width": width, "device": plan.device}
    one = unet_cost(plan.pipeline.unet, plan.text, factor=plan.factor, batch=1, **options)
    return one.flops, decoder_cost(plan.pipeline.vae, tiled=False, **options).flops


@torch.no_grad()
def estimate_times(estimate: Estimate, plan: RunPlan, height: int, width: int, flops: tuple[int, int]) -> Estimate:
    """The estimate with times, from one real call of the UNet and one of the decoder at a small size.

    Where these calls are so short that overhead dominates, larger sizes of the run's stages are timed instead. Models
    that are offloaded are timed at the small size alone. ``flops`` are those at the small size, from
    :func:`base_flops`.
    """
    sizes = [(height, width)]
    if plan.offload not in MODELS:
        ratios = [(one, one.height * one.width / height / width) for one in estimate.stages if one.steps]
        sizes += [(one.height, one.width) for one, ratio in ratios if 1 < ratio <= _LARGEST_TIMED]
    rates = [math.inf, math.inf]
    for number, size in enumerate(sizes):
        counts = base_flops(plan, *size) if number else flops
        times = _time_calls(plan, *size)
        rates = [seconds / max(count, 1) for seconds, count in zip(times, counts, strict=True)]
        if min(times) > _SHORT_CALL:
            break
    timed = (replace(one, seconds=one.flops * rates[0 if one.steps else 1]) for one in estimate.stages)
    return replace(estimate, stages=tuple(timed))


def _time_calls(plan: RunPlan, height: int, width: int) -> tuple[float, float]:
    """Seconds of one call of the UNet and of decoding one image."""
    unet, vae = plan.pipeline.unet, plan.pipeline.vae
    sides = height // plan.factor, width // plan.factor
    latents = torch.zeros(1, unet.config.in_channels, *sides, dtype=unet.dtype, device=plan.device)
    arguments = unet_arguments(unet, plan.text[:1].to(plan.device), height, width)
    z = torch.zeros(1, vae.config.latent_channels, *sides, dtype=vae.dtype, device=plan.device)
    return _seconds(lambda: unet(latents, 1, **arguments), plan.device), _seconds(lambda: vae.decode(z), plan.device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The time of the fastest of up to three calls; the first selects kernels, and with offloading loads weights."""
    best, spent = math.inf, 0.0
    for _ in range(3):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
        if device.type == "cpu" and spent > _LONG_CALL:
            break  # on the CPU a first call is hardly slower than the others
    return best


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; on a GPU, PyTorch's own cached blocks count as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63 - 1  # unknown: then nothing is refused


def model_bytes(model: torch.nn.Module) -> int:
    """The size of a model's parameters."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def format_bytes(count: float) -> str:
    """A number of bytes for people.

    Example:
        >>> format_bytes(31_300_000_000), format_bytes(2_500_000)
        ('31.3 GB', '2.5 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 5e8 else f"{count / 1e6:.1f} MB"


def format_seconds(seconds: float) -> str:
    """A duration for people.

    Example:
        >>> format_seconds(0.25), format_seconds(75), format_seconds(4000)
        ('0.2 s', '1 min 15 s', '1 h 06 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class CallCost:
    """Operations and memory of one call."""

    flops: int
    """As ``torch.utils.flop_counter`` counts them, scans included: two for a multiply-add."""
    peak_bytes: int
    """The peak size of the results that are alive at once, without the inputs and weights."""


class CostTracker(TorchDispatchMode):
    """Counts operations and follows allocations, of real and of fake tensors.

    A result on ``device`` counts from its creation until its storage is no longer referenced. Memory that a kernel
    allocates and frees internally is not seen.

    Example:
        >>> with CostTracker(torch.device("cpu")) as tracker:
        ...     y = torch.ones(1000) + 1
        >>> tracker.cost.peak_bytes
        8000
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # Imported here, because it imports triton where that is installed.
        from torch.utils.flop_counter import flop_registry

        from gspn.ops import flop_counts as _formulas  # noqa: F401  (registers those of the scans)

        self._formulas, self._device = flop_registry, device.type
        self._live: dict[int, int] = {}
        self._bytes = self._peak = self._flops = 0

    @property
    def cost(self) -> CallCost:
        """The cost so far."""
        return CallCost(self._flops, self._peak)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=result)
        # A view of an input, such as a weight, allocates nothing.
        inputs = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.device.type == self._device:
                storage = one.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self._live:
                    self._live[storage._cdata] = storage.nbytes()
                    self._bytes += storage.nbytes()
                    self._peak = max(self._peak, self._bytes)
                    weakref.finalize(storage, self._freed, storage._cdata).atexit = False
        return result

    def _freed(self, key: int) -> None:
        self._bytes -= self._live.pop(key, 0)


@torch.no_grad()
def call_cost(
    module: nn.Module, call: Callable[..., Any], device: torch.device, *, dtype: torch.dtype | None = None
) -> CallCost:
    """The cost of a call of a module, predicted on fake tensors: nothing is allocated or computed.

    ``call`` makes inputs on ``device``, which need not exist, and calls its argument as it would call the module, whose
    weights count as if they were there, in ``dtype`` or their own.

    Example:
        >>> layer = nn.Linear(1000, 1000)
        >>> call_cost(layer, lambda layer: layer(torch.empty(1, 1000)), torch.device("cpu"))
        CallCost(flops=2000000, peak_bytes=8000)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        # The weights are converted before the tracker starts, so that they do not count.
        weights = {
            name: fake.from_tensor(value).to(device, dtype if value.is_floating_point() else None)
            for name, value in [*module.named_parameters(), *module.named_buffers()]
        }

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(module, weights, args, kwargs)

        with CostTracker(device) as tracker:
            call(stand_in)
    return tracker.cost


def unet_cost(
    unet: Any, text: Conditioning, *, height: int, width: int, factor: int, batch: int, device: torch.device,
    offload: bool = False,
) -> CallCost:  # fmt: skip
    """The cost of one call of a UNet, with or without an adapter, for images of a size in pixels.

    Of the text only the length counts, and ``batch`` includes the images for guidance. ``factor`` is the VAE's pixels
    per latent pixel; ``offload`` says that the skip tensors are in host memory.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=unet.dtype, device=device)

    def call(stand_in: Callable[..., Any]) -> None:
        latents = empty(unet.config.in_channels, height // factor, width // factor)
        pooled = None if text.pooled is None else empty(*text.pooled.shape[1:])
        arguments = unet_arguments(unet, Conditioning(empty(*text.states.shape[1:]), pooled), height, width)
        stand_in(latents, 1, **arguments, return_dict=False)

    with offloaded_skips(unet, storage="cpu") if offload else contextlib.nullcontext():
        return call_cost(unet, call, device)


def decoder_cost(vae: Any, *, height: int, width: int, tiled: bool, device: torch.device) -> CallCost:
    """The cost of decoding one image, whole or in tiles; the decoded tiles are all kept until the last is done."""
    factor = vae_scale_factor(vae.config.block_out_channels)
    dtype = torch.float32 if vae.dtype == torch.float16 and vae.config.force_upcast else vae.dtype

    def whole(h: int, w: int) -> CallCost:
        shape = (1, vae.config.latent_channels, h // factor, w // factor)
        return call_cost(
            _Decoder(vae), lambda decoder: decoder(torch.empty(shape, dtype=dtype, device=device)), device, dtype=dtype
        )

    side = tile_sides(vae)[0]
    if not tiled or max(height, width) <= side:
        return whole(height, width)
    one = whole(min(side, height), min(side, width))
    stride = int(side * _TILE_STRIDE)
    area = math.prod(sum(min(side, length - at) for at in range(0, length, stride)) for length in (height, width))
    share = area / (min(side, height) * min(side, width))
    kept = 3 * dtype.itemsize * (area + height * width)
    peak = max(one.peak_bytes + kept, 3 * dtype.itemsize * (area + 2 * height * width))
    return CallCost(int(one.flops * share), peak)


class _Decoder(nn.Module):
    """The decoding half of a VAE, without tiles."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
