"""The UNet of a text-to-image model at growing sizes: with self-attention, with GSPN, and with no token mixer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn._errors import UsageError
from gspn.diffusers import GSPNAdapter, GSPNTokenMixer
from gspn.diffusers.mounting import self_attention_blocks

from .accuracy_check import Accuracy, compare
from .attention import SELF_ATTENTION
from .report import Result
from .size_sweep import SizeSweep

GSPN, SHARED, LOCAL, NO_MIXER = "GSPN", "GSPN, shared taps", "GSPN, segments", "no self-attention"
BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
VAE_FACTOR = 8
"""The side of an image over the side of its latent."""
_CHECK_MAP = (9, 12)
_TEXT_TOKENS = 77

# As in their published configurations, without what has no effect on time.
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
    """Returns its input in the place of a self-attention, which leaves the block's norm and residual."""

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> Tensor:
        """``[B, N, D]`` to itself."""
        return hidden_states


@dataclass(frozen=True, kw_only=True)
class UNetSweep(SizeSweep):
    """One denoising call with self-attention, with GSPN (global, shared taps, segments), and with no token mixer.

    Weights are random, which has no effect on time. All candidates share the weights of what they have in common. The
    UNet with no token mixer is a lower bound on the time. Sizes are those of images, multiples of 64.

    Args:
        arch: a key of :data:`ARCHITECTURES`.
        width: the number that divides the widths of the published UNet.
        backend: a key of :data:`BACKENDS`, for all attention of the UNet.
        segment: the lines after which the scans of ``"GSPN, segments"`` restart.
    """

    benchmark: ClassVar[str] = "unet"
    candidates: ClassVar[tuple[str, ...]] = (SELF_ATTENTION, GSPN, SHARED, LOCAL, NO_MIXER)
    baseline: ClassVar[str] = SELF_ATTENTION

    arch: str = "sd15"
    width: int = 1
    backend: str = "auto"
    segment: int = 8
    _unets: dict[str, UNet2DConditionModel] = field(default_factory=dict, init=False, repr=False, compare=False)

    def config(self) -> dict[str, Any]:
        """The UNet's configuration.

        Raises:
            UsageError: an unknown architecture, or a width that does not divide its channels.
        """
        if self.arch not in ARCHITECTURES:
            raise UsageError(f"{self.arch!r} is not one of {', '.join(ARCHITECTURES)}.")
        config = dict(ARCHITECTURES[self.arch])
        channels = config["block_out_channels"]
        groups = next(count for count in (32, 16, 8, 4, 2, 1) if channels[0] // self.width % count == 0)
        if any(one % (self.width * groups) for one in channels) or channels[0] // self.width < 8:
            raise UsageError(f"width=1/{self.width} does not divide the channels {channels} of {self.arch}.")
        config |= {"block_out_channels": tuple(one // self.width for one in channels), "norm_num_groups": groups}
        heads = config["attention_head_dim"]  # diffusers' name for the number of heads
        if isinstance(heads, tuple):
            config["attention_head_dim"] = tuple(max(1, round(one / self.width)) for one in heads)
        return config

    def unet(self, candidate: str) -> UNet2DConditionModel:
        """The UNet of a candidate, with seeded random weights."""
        if not self._unets:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                whole = UNet2DConditionModel(**self.config())
            # The module's own `to`: that of diffusers warns of a dtype, whatever it is.
            nn.Module.to(whole, device=self.device, dtype=self.dtype).to(memory_format=torch.channels_last)
            self._unets[SELF_ATTENTION] = whole.eval()
        if candidate not in self._unets:
            whole = self._unets[SELF_ATTENTION]
            # Another tree of modules over the same weights.
            unet = copy.deepcopy(whole, {id(p): p for p in whole.parameters()})
            if candidate == NO_MIXER:
                for block in self_attention_blocks(unet).values():
                    block.attn1 = cast("Any", PassThrough())
            else:
                options: dict[str, Any] = {SHARED: {"groups": 1}, LOCAL: {"segment": self.segment}}.get(candidate, {})
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    GSPNAdapter.from_model(unet, **options).mount(unet)
            self._unets[candidate] = unet
        return self._unets[candidate]

    def inputs(self, size: int) -> dict[str, Any]:
        """Random latents of images of ``size``, and the text encoder's output."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        config = ARCHITECTURES[self.arch]
        inputs: dict[str, Any] = {
            "sample": random(self.batch, 4, size // VAE_FACTOR, size // VAE_FACTOR),
            "timestep": torch.tensor(500, device=self.device),
            "encoder_hidden_states": random(self.batch, _TEXT_TOKENS, config["cross_attention_dim"]),
        }
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            times = torch.ones(self.batch, 6, device=self.device, dtype=self.dtype)
            inputs["added_cond_kwargs"] = {"text_embeds": random(self.batch, pooled), "time_ids": times}
        return inputs

    def call(self, candidate: str, size: int) -> Callable[[], Tensor]:
        """One denoising call."""
        unet, inputs, backend = self.unet(candidate), self.inputs(size), BACKENDS[self.backend]

        def run() -> Tensor:
            with torch.no_grad(), nullcontext() if backend is None else sdpa_kernel(backend):
                return unet(**inputs).sample

        return run

    def calls(self, candidates: Sequence[str], size: int) -> dict[str, Callable[[], object]]:
        """One denoising call of each candidate."""
        return {name: self.call(name, size) for name in candidates}

    def measure(self, sizes: Sequence[int], candidates: Sequence[str] | None = None, **options: Any) -> list[Result]:
        """Time the candidates at each size of image, see :meth:`SizeSweep.measure`.

        Raises:
            UsageError: a size is not a multiple of 64, or the backend does not run here.
        """
        check_sizes(sizes)
        if BACKENDS[self.backend] is not None:
            try:
                self.call(self.candidates[0], 64)()
            except RuntimeError as error:
                raise UsageError(f"attention's backend {self.backend!r} does not run here: {error}") from None
        return super().measure(sizes, candidates, **options)

    def params(self, candidate: str) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.unet(candidate).parameters())

    def described_mode(self) -> str:
        """The architecture and the width."""
        return f"{self.arch}, width 1/{self.width}"

    def check(self) -> dict[str, list[Accuracy]]:
        """Compare a mixer of each width, of each candidate that has mixers, with its specification."""
        accuracies: dict[str, list[Accuracy]] = {}
        for name in self.candidates:
            mixers = {m.dim: m for m in self.unet(name).modules() if isinstance(m, GSPNTokenMixer)}
            if mixers:
                accuracies[name] = mixer_accuracies(mixers, self.device, self.dtype)
        return accuracies


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise a ``UsageError`` unless all sizes of images are multiples of 64."""
    for size in sizes:
        if size < 64 or size % 64:
            raise UsageError(
                f"size {size} is not a multiple of 64: the latent is an eighth of it, and is halved three times."
            )


def mixer_accuracies(mixers: Mapping[int, GSPNTokenMixer], device: torch.device, dtype: torch.dtype) -> list[Accuracy]:
    """Compare mixers, by their channels, with their float64 specification on a small map."""
    height, width = _CHECK_MAP
    results: list[dict[str, Tensor]] = [{}, {}, {}]
    for dim, mixer in mixers.items():
        x = torch.randn(1, height * width, dim, generator=torch.Generator().manual_seed(dim)).to(device, dtype)
        plain = copy.deepcopy(mixer)
        setattr(plain.scan, "impl", "reference")  # noqa: B010  (pyright takes a module's attributes for tensors)
        exact = copy.deepcopy(plain).double()
        with torch.no_grad():
            for result, module, tokens in zip(results, (mixer, plain, exact), (x, x, x.double()), strict=True):
                result[f"{dim} channels"] = module(tokens, map_size=_CHECK_MAP)
    return compare(*results)


def over_lower_bound(results: Sequence[Result]) -> dict[tuple[str, int], float]:
    """For each candidate and size its time over that of the UNet with no token mixer."""
    bounds = {r.height: r.timing.p50 for r in results if r.name == NO_MIXER and r.timing is not None}
    return {
        (r.name, r.height): r.timing.p50 / bounds[r.height]
        for r in results
        if r.timing is not None and r.height in bounds
    }
