"""A batch of images of several sizes, one after the other: each is computed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def each_image(valid_size: Tensor, *maps: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """For each image the maps ``[1, .., h, w]`` that it has, cut from ``[B, .., H, W]``."""
    for i, (height, width) in enumerate(valid_size.clamp(min=0).tolist()):
        yield tuple(None if one is None else one[i : i + 1, ..., :height, :width] for one in maps)


def put_together(images: Sequence[Any], like: Tensor) -> Tensor:
    """Images ``[1, .., h, w]`` to one tensor like ``like [B, .., H, W]``, with zeros around them."""
    whole = torch.zeros_like(like)
    for i, image in enumerate(images):
        whole[i : i + 1, ..., : image.shape[-2], : image.shape[-1]] = image
    return whole
