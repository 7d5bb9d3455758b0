"""Decoding latents to pixels and encoding back with a pipeline's VAE, in tiles for large images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.devices import Processes
from ..diffusion.autoencoder import vae_scale_factor
from .conditioning import has_further_conditions

TILED_FROM = 1536 * 1536
"""Pixels above which ``tiling="auto"`` decodes in tiles."""

MIN_TILE = 512
"""The smallest side of a tile in pixels: the default of a VAE is its trained size, which may be tiny."""


@contextmanager
def tiles(vae: Any, on: bool, *, side: int | None = None) -> Iterator[None]:
    """Within the block, a VAE works in overlapping tiles or on whole images; its own settings are restored after it.

    ``side`` is the side of a tile in pixels; by default the VAE's own, but at least :data:`MIN_TILE`.

    Example:
        >>> with tiles(pipeline.vae, True):  # doctest: +SKIP
        ...     to_pixels(pipeline, latents)
    """
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    try:
        if on:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile_sides(vae, side)
        else:
            vae.disable_tiling()
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def shared_tiles(vae: Any, processes: Processes) -> Iterator[None]:
    """Within the block, each process decodes and encodes some of a VAE's tiles, and all have the whole result.

    diffusers' own tiling runs twice: first to see the tiles, then to blend what the processes have computed of them. So
    the result is that of one process, bit for bit. All processes have to decode, or encode, the same.
    """
    methods = {"tiled_decode": vae.decoder, "_tiled_encode": vae.encoder}
    for name, part in methods.items():
        setattr(vae, name, partial(_tiled, getattr(vae, name), part, processes))
    try:
        yield
    finally:
        for name in methods:
            delattr(vae, name)


def _tiled(method: Callable[..., Any], part: Any, processes: Processes, x: Tensor, **options: Any) -> Any:
    tiles: list[Tensor] = []
    channels = part.conv_out.out_channels

    def record(tile: Tensor) -> Tensor:
        tiles.append(tile)
        return tile.new_zeros(len(tile), channels, 1, 1)

    with _replaced_forward(part, record):
        method(x, **options)
    own = {number: part(tiles[number]) for number in processes.share(range(len(tiles)))}
    # The layout too: what diffusers computes of the tiles depends on it in the last bit.
    known: dict[int, tuple[torch.Size, torch.memory_format]] = {}
    for some in processes.gather({number: (result.shape, _layout(result)) for number, result in own.items()}):
        known |= some
    results = []
    for number, tile in enumerate(tiles):
        shape, layout = known[number]
        result = own.pop(number).contiguous() if number in own else tile.new_empty(shape)
        results.append(processes.broadcast(result, number % processes.count).contiguous(memory_format=layout))
    with _replaced_forward(part, lambda _: results.pop(0)):
        return method(x, **options)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@contextmanager
def _replaced_forward(module: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def tile_sides(vae: Any, side: int | None = None) -> tuple[int, int]:
    """The side of a tile in pixels and in latent pixels."""
    factor = vae_scale_factor(vae.config.block_out_channels)
    own = vae.config.sample_size
    own = own if isinstance(own, int) else max(own)
    # A quarter of a tile overlaps; the tiles fit together only if that is a whole number of latent pixels.
    latent = max(4, round((side or max(own, MIN_TILE)) / factor / 4) * 4)
    return latent * factor, latent


@torch.no_grad()
def to_pixels(pipeline: Any, latents: Tensor) -> Tensor:
    """Decode the UNet's latents to images ``[B, 3, H, W]`` in about [-1, 1], float32."""
    vae = pipeline.vae
    shift, scale = shift_and_scale(pipeline, latents)
    with _upcast(vae):
        return vae.decode((latents * scale + shift).to(vae.dtype), return_dict=False)[0].float()


@torch.no_grad()
def to_latents(pipeline: Any, pixels: Tensor) -> Tensor:
    """Encode images to the UNet's latents: the mode of the VAE's distribution."""
    vae = pipeline.vae
    with _upcast(vae):
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().to(pixels.dtype)
    shift, scale = shift_and_scale(pipeline, latents)
    return (latents - shift) / scale


def to_images(pipeline: Any, pixels: Tensor) -> list[Image.Image]:
    """Convert images ``[B, 3, H, W]`` in [-1, 1] to PIL images."""
    return pipeline.image_processor.postprocess(pixels, output_type="pil", do_denormalize=[True] * len(pixels))


def shift_and_scale(pipeline: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """The shift and scale in ``VAE latents = scale * UNet latents + shift``; only some XL pipelines have a shift."""
    config = pipeline.vae.config
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None or not has_further_conditions(pipeline.unet):
        return 0.0, 1 / config.scaling_factor
    shift, scale = (torch.tensor(one).view(1, -1, 1, 1).to(like) for one in (mean, deviation))
    return shift, scale / config.scaling_factor


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """Use float32 where the VAE's activations exceed float16's range, as its config says."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)
