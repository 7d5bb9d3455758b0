"""The UNet of a text-to-image model at growing sizes: with its self-attention, with GSPN, and with neither."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn.diffusers import GSPNAdapter, GSPNTokenMixer
from gspn.diffusers.mounting import self_attention_blocks

from .accuracy_check import Figure, compare
from .comparison import Result
from .size_sweep import exponents as exponents
from .size_sweep import measure_growing

CPU = torch.device("cpu")
ATTENTION, GSPN, SHARED, LOCAL, FLOOR = (
    "self-attention",
    "GSPN",
    "GSPN, shared taps",
    "GSPN, segments",
    "no self-attention",
)
CANDIDATES = (ATTENTION, GSPN, SHARED, LOCAL, FLOOR)
BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
PIXELS = 8
"""Pixels of an image for one of its latent, along a side."""
_CHECK_MAP = (9, 12)
_TEXT_TOKENS = 77

# As their published configurations state them, but for what does not bear on time.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


class PassThrough(nn.Module):
    """In the place of a self-attention, its input: what is left is the block's norm and residual."""

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> Tensor:
        """``[B, N, D]`` to itself."""
        return hidden_states


@dataclass(frozen=True)
class UNetProblem:
    """What is compared: everything but the sizes.

    Args:
        arch: of :data:`ARCHITECTURES`.
        width: what the widths of the real one are divided by.
        batch: images of a call; guidance doubles it in use.
        dtype: of weights and latents.
        device: where it runs.
        backend: of :data:`BACKENDS`, for all attention of the UNet.
        segment: lines of :data:`LOCAL`.
    """

    arch: str = "sd15"
    width: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    backend: str = "auto"
    segment: int = 8
    _made: dict[str, UNet2DConditionModel] = field(default_factory=dict, repr=False)

    def config(self) -> dict[str, Any]:
        """The UNet's configuration.

        Raises:
            ValueError: an unknown architecture, or a width that does not divide its own.
        """
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"{self.arch!r} is not one of {', '.join(ARCHITECTURES)}.")
        config = dict(ARCHITECTURES[self.arch])
        channels = config["block_out_channels"]
        groups = next(count for count in (32, 16, 8, 4, 2, 1) if channels[0] // self.width % count == 0)
        if any(one % (self.width * groups) for one in channels) or channels[0] // self.width < 8:
            raise ValueError(f"width=1/{self.width} does not divide the channels {channels} of {self.arch}.")
        config |= {"block_out_channels": tuple(one // self.width for one in channels), "norm_num_groups": groups}
        heads = config["attention_head_dim"]  # diffusers' name for the number of heads
        if isinstance(heads, tuple):
            config["attention_head_dim"] = tuple(max(1, round(one / self.width)) for one in heads)
        return config

    def unet(self, name: str) -> UNet2DConditionModel:
        """The UNet of a candidate, with seeded random weights: all share those of what they have in common."""
        if name not in self._made:
            if not self._made:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    whole = UNet2DConditionModel(**self.config())
                # The module's own: diffusers' warns of a dtype, whatever it is.
                nn.Module.to(whole, device=self.device, dtype=self.dtype).to(memory_format=torch.channels_last)
                self._made[ATTENTION] = whole.eval()
            self._made[name] = self._changed(self._made[ATTENTION], name)
        return self._made[name]

    def _changed(self, whole: UNet2DConditionModel, name: str) -> UNet2DConditionModel:
        if name == ATTENTION:
            return whole
        # Another tree of modules over the same weights.
        unet = copy.deepcopy(whole, {id(p): p for p in whole.parameters()})
        if name == FLOOR:
            for block in self_attention_blocks(unet).values():
                block.attn1 = cast("Any", PassThrough())
            return unet
        options: dict[str, Any] = {SHARED: {"groups": 1}, LOCAL: {"segment": self.segment}}.get(name, {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            GSPNAdapter.from_model(unet, **options).mount(unet)
        return unet

    def inputs(self, size: int) -> dict[str, Any]:
        """Random latents of images of ``size``, and the text's states."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        config = ARCHITECTURES[self.arch]
        given: dict[str, Any] = {
            "sample": random(self.batch, 4, size // PIXELS, size // PIXELS),
            "timestep": torch.tensor(500, device=self.device),
            "encoder_hidden_states": random(self.batch, _TEXT_TOKENS, config["cross_attention_dim"]),
        }
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            times = torch.ones(self.batch, 6, device=self.device, dtype=self.dtype)
            given["added_cond_kwargs"] = {"text_embeds": random(self.batch, pooled), "time_ids": times}
        return given

    def call(self, name: str, size: int) -> Callable[[], object]:
        """One denoising call."""
        unet, given, backend = self.unet(name), self.inputs(size), BACKENDS[self.backend]

        def run() -> object:
            with torch.no_grad(), nullcontext() if backend is None else sdpa_kernel(backend):
                return unet(**given).sample

        return run


def check_mixers(problem: UNetProblem, names: Sequence[str] = CANDIDATES) -> dict[str, list[Figure]]:
    """Hold a mixer of each width of each candidate against its float64 specification, on a small map, not square.

    Returns:
        For each candidate with mixers its figures; it may be timed only if all of them are ``ok``.
    """
    figures: dict[str, list[Figure]] = {}
    for name in names:
        mixers = {m.dim: m for m in problem.unet(name).modules() if isinstance(m, GSPNTokenMixer)}
        if not mixers:
            continue
        results: list[dict[str, Tensor]] = [{}, {}, {}]
        for dim, mixer in mixers.items():
            height, width = _CHECK_MAP
            x = torch.randn(1, height * width, dim, generator=torch.Generator().manual_seed(dim))
            x = x.to(problem.device, problem.dtype)
            plain = copy.deepcopy(mixer)
            setattr(plain.scan, "impl", "reference")  # noqa: B010  (pyright takes a module's attributes for tensors)
            exact = copy.deepcopy(plain).double()
            with torch.no_grad():
                for found, one, tokens in zip(results, (mixer, plain, exact), (x, x, x.double()), strict=True):
                    found[f"{dim} channels"] = one(tokens, map_size=_CHECK_MAP)
        figures[name] = compare(*results)
    return figures


def measure_unets(
    problem: UNetProblem,
    names: Sequence[str] = CANDIDATES,
    sizes: Sequence[int] = (256, 512, 1024),
    *,
    baseline: str = ATTENTION,
    slowest_ms: float = 60_000.0,
    repeats: int = 3,
    min_time: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Time one denoising call of each candidate at growing sizes, in turns; :func:`check_mixers` comes before.

    Weights are random, which time does not depend on. A candidate drops out before the size at which a call would take
    longer than ``slowest_ms``.

    Args:
        problem: what to compare.
        names: of :data:`CANDIDATES`.
        sizes: H and W of the images, multiples of 64.
        baseline: the candidate that ratios are to.
        slowest_ms: the longest call to time.
        repeats: see :func:`~gspn.bench.timing.time_interleaved`.
        min_time: likewise.
        progress: called with (sizes done, sizes planned).

    Returns:
        A result for each size and candidate, in this order.

    Raises:
        ValueError: a size is no multiple of 64, or the backend does not run here.
    """
    odd = [size for size in sizes if size < 64 or size % 64]
    if odd:
        raise ValueError(
            f"size {odd[0]} is no multiple of 64: the latent is an eighth of it, and is halved three times."
        )
    parameters = {name: sum(p.numel() for p in problem.unet(name).parameters()) for name in names}
    if BACKENDS[problem.backend] is not None:
        try:
            problem.call(names[0], 64)()
        except RuntimeError as error:
            raise ValueError(f"attention's backend {problem.backend!r} does not run here: {error}") from None
    return measure_growing(
        "unet",
        names,
        sizes,
        lambda size, running: {name: problem.call(name, size) for name in running},
        lambda name, size: None,  # noqa: ARG005  (operations of attention are not the point: all else is the same)
        mode=f"{problem.arch}, width 1/{problem.width}",
        batch=problem.batch,
        dtype=problem.dtype,
        device=problem.device,
        baseline=baseline,
        params=parameters,
        slowest_ms=slowest_ms,
        repeats=repeats,
        min_time=min_time,
        progress=progress,
    )


def over_floor(results: Sequence[Result]) -> dict[tuple[str, int], float]:
    """For each candidate and size its time over that of the UNet without self-attention."""
    floor = {r.height: r.timing.p50 for r in results if r.name == FLOOR and r.timing is not None}
    return {
        (r.name, r.height): r.timing.p50 / floor[r.height]
        for r in results
        if r.timing is not None and r.height in floor
    }
