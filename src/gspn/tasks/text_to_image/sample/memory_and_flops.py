"""Operations and memory of a call: counted and followed, on real tensors or on fake ones, which have shapes alone."""

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

_STRIDE_OF_TILES = 0.75


@dataclass(frozen=True)
class Usage:
    """What one call takes.

    Attributes:
        operations: As ``torch.utils.flop_counter`` counts them, the scans among them: two for a multiply-add.
        peak: Bytes of results alive at once, without what was there before.
    """

    operations: int
    peak: int


class UsageTracker(TorchDispatchMode):
    """Counts operations and follows allocations, of real and of fake tensors.

    An operation's result counts from when it is there until nothing refers to its storage any more. What a kernel takes
    while it runs, and gives back, is not seen.

    Args:
        device: Whose memory is followed.

    Example:
        >>> with UsageTracker(torch.device("cpu")) as tracker:
        ...     y = torch.ones(1000) + 1
        >>> tracker.usage.peak
        8000
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # Imported here: it imports triton, where there is one.
        from torch.utils.flop_counter import flop_registry

        from gspn.ops import flop_counts as _formulas  # noqa: F401  (registers those of the scans)

        self._formulas = flop_registry
        self._device = device.type
        self._live: dict[int, int] = {}
        self._bytes = self._peak = self._operations = 0

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(self._operations, self._peak)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self._operations += formula(*args, **kwargs, out_val=found)
        # A view of what came in from outside, weights say, allocates nothing.
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and one.device.type == self._device:
                storage = one.untyped_storage()
                if storage._cdata not in given:
                    self._allocated(storage)
        return found

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = size
        self._bytes += size
        self._peak = max(self._peak, self._bytes)
        weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        self._bytes -= self._live.pop(key, 0)


@torch.no_grad()
def usage_of(
    module: nn.Module, call: Callable[..., Any], device: torch.device, *, dtype: torch.dtype | None = None
) -> Usage:
    """What a call of a module would take, on fake tensors: it allocates nothing and computes nothing.

    Args:
        module: Whose weights, wherever they are, count as being on ``device``.
        call: Makes its own inputs, on ``device``, and calls what it is given as it would the module.
        device: Where it would run; it need not exist.
        dtype: Of the weights; by default as they are.

    Example:
        >>> layer = nn.Linear(1000, 1000)
        >>> usage_of(layer, lambda layer: layer(torch.empty(1, 1000)), torch.device("cpu"))
        Usage(operations=2000000, peak=8000)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        # All that is derived from the weights once, outside of what is followed.
        weights = {
            name: fake.from_tensor(value).to(device, dtype if value.is_floating_point() else None)
            for name, value in [*module.named_parameters(), *module.named_buffers()]
        }

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(module, weights, args, kwargs)

        with UsageTracker(device) as tracker:
            call(stand_in)
    return tracker.usage


def unet_usage(
    unet: Any, text: Conditioning, *, height: int, width: int, factor: int, batch: int, device: torch.device,
    offload: bool = False,
) -> Usage:  # fmt: skip
    """What one call of a UNet would take.

    Args:
        unet: With an adapter or without.
        text: Any prompts; their lengths count.
        height: Of the images in pixels.
        width: Likewise.
        factor: Of the VAE.
        batch: Images at a time, those for guidance among them.
        device: Where it would run.
        offload: With the skip tensors in host memory.
    """

    def empty(like: Tensor) -> Tensor:
        return torch.empty(batch, *like.shape[1:], dtype=unet.dtype, device=device)

    def call(stand_in: Callable[..., Any]) -> None:
        latents = torch.empty(
            batch, unet.config.in_channels, height // factor, width // factor, dtype=unet.dtype, device=device
        )
        found = Conditioning(empty(text.states), None if text.pooled is None else empty(text.pooled))
        stand_in(latents, 1, **unet_arguments(unet, found, height, width), return_dict=False)

    with offloaded_skips(unet, storage="cpu") if offload else contextlib.nullcontext():
        return usage_of(unet, call, device)


def decoder_usage(vae: Any, *, height: int, width: int, tiled: bool, device: torch.device) -> Usage:
    """What decoding one image would take: whole, or of its tiles, of which all results are kept until the last."""
    latent_channels, factor = vae.config.latent_channels, vae_scale_factor(vae.config.block_out_channels)
    dtype = torch.float32 if vae.dtype == torch.float16 and vae.config.force_upcast else vae.dtype

    def whole(h: int, w: int) -> Usage:
        def call(stand_in: Callable[..., Any]) -> None:
            stand_in(torch.empty(1, latent_channels, h // factor, w // factor, dtype=dtype, device=device))

        return usage_of(_Decoding(vae), call, device, dtype=dtype)

    side = tile_sides(vae)[0]
    if not tiled or max(height, width) <= side:
        return whole(height, width)
    one = whole(min(side, height), min(side, width))
    stride = int(side * _STRIDE_OF_TILES)
    area = math.prod(sum(min(side, length - at) for at in range(0, length, stride)) for length in (height, width))
    share = area / (min(side, height) * min(side, width))
    kept = 3 * dtype.itemsize * (area + height * width)
    return Usage(int(one.operations * share), max(one.peak + kept, 3 * dtype.itemsize * (area + 2 * height * width)))


class _Decoding(nn.Module):
    """A VAE's way back to pixels, whole."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
