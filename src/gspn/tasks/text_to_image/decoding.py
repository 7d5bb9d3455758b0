"""Between latents and pixels: a pipeline's VAE, in tiles where an image is large."""

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
"""Pixels of a tile's side at least: a VAE's own tile is its training's image, which may be tiny."""


@contextmanager
def tiles(vae: Any, on: bool, *, side: int | None = None) -> Iterator[None]:
    """Within the block a VAE encodes and decodes in overlapping tiles, or whole; afterwards as it did before.

    Args:
        vae: An ``AutoencoderKL``.
        on: In tiles.
        side: Of a tile in pixels; by default the VAE's own, :data:`MIN_TILE` at least.

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
    # A quarter overlaps, which has to be whole latent pixels for the seams to meet.
    latent = max(4, round((side or max(own, MIN_TILE)) / factor / 4) * 4)
    return latent * factor, latent


@torch.no_grad()
def to_pixels(pipeline: Any, latents: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in about [-1, 1], float32, of latents as the UNet has them."""
    vae = pipeline.vae
    shift, scale = shift_and_scale(pipeline, latents)
    with _wide_enough(vae):
        return vae.decode((latents * scale + shift).to(vae.dtype), return_dict=False)[0].float()


@torch.no_grad()
def to_latents(pipeline: Any, pixels: Tensor) -> Tensor:
    """The latents, as the UNet has them, of images: the mode of what the VAE encodes."""
    vae = pipeline.vae
    with _wide_enough(vae):
        found = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().to(pixels.dtype)
    shift, scale = shift_and_scale(pipeline, found)
    return (found - shift) / scale


def to_images(pipeline: Any, pixels: Tensor) -> list[Image.Image]:
    """Images as files hold them."""
    return pipeline.image_processor.postprocess(pixels, output_type="pil", do_denormalize=[True] * len(pixels))


def shift_and_scale(pipeline: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """VAE's latents = scale * the UNet's + shift. Only the XL pipeline of diffusers knows means, and none a shift."""
    config = pipeline.vae.config
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None or not has_further_conditions(pipeline.unet):
        return 0.0, 1 / config.scaling_factor
    shift, scale = (torch.tensor(one).view(1, -1, 1, 1).to(like) for one in (mean, deviation))
    return shift, scale / config.scaling_factor


@contextmanager
def _wide_enough(vae: Any) -> Iterator[None]:
    """In float32 where the VAE's activations leave float16's range, as its configuration says."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)
