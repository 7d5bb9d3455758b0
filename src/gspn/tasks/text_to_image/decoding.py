"""Decoding latents to pixels and encoding back with a pipeline's VAE, in tiles for large images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

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
