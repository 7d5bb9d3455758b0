"""Floating-point operations and memory of one call, counted on real tensors or on fake ones, which hold no data."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...diffusion.autoencoder import vae_scale_factor
from ..conditioning import Conditioning, unet_arguments
from ..decoding import tile_sides
from .offload import offloaded_skips

_TILE_STRIDE = 0.75  # of a tile's side: diffusers' tiles overlap by a quarter


@dataclass(frozen=True)
class CallCost:
    """Operations and memory of one call.

    Attributes:
        flops: As ``torch.utils.flop_counter`` counts them, scans included: two for a multiply-add.
        peak_bytes: The peak size of the results that are alive at once, without the inputs and weights.
    """

    flops: int
    peak_bytes: int


class CostTracker(TorchDispatchMode):
    """Counts operations and follows allocations, of real and of fake tensors.

    A result counts from its creation until its storage is no longer referenced. Memory that a kernel allocates and
    frees internally is not seen.

    Args:
        device: The device whose memory is followed.

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

        self._formulas = flop_registry
        self._device = device.type
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
                    self._allocated(storage)
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        self._live[storage._cdata] = storage.nbytes()
        self._bytes += storage.nbytes()
        self._peak = max(self._peak, self._bytes)
        weakref.finalize(storage, self._freed, storage._cdata).atexit = False

    def _freed(self, key: int) -> None:
        self._bytes -= self._live.pop(key, 0)


@torch.no_grad()
def call_cost(
    module: nn.Module, call: Callable[..., Any], device: torch.device, *, dtype: torch.dtype | None = None
) -> CallCost:
    """The cost of a call of a module, predicted on fake tensors: nothing is allocated or computed.

    Args:
        module: The module; its weights count as if they were on ``device``.
        call: A function that makes inputs on ``device`` and calls its argument as it would call the module.
        device: The device of the predicted call, which need not exist.
        dtype: Of the weights; their own by default.

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
    """The cost of one call of a UNet, with or without an adapter.

    Args:
        unet: A ``UNet2DConditionModel``.
        text: Any encoded prompts; only their length counts.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        factor: The VAE's pixels per latent pixel.
        batch: Images in the call, those for guidance included.
        device: The device of the predicted call.
        offload: Whether the skip tensors are in host memory.
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
        def call(stand_in: Callable[..., Any]) -> None:
            shape = (1, vae.config.latent_channels, h // factor, w // factor)
            stand_in(torch.empty(shape, dtype=dtype, device=device))

        return call_cost(_Decoder(vae), call, device, dtype=dtype)

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
