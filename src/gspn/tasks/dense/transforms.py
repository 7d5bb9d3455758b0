"""Transforms of an image and its map together, into one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..._errors import require
from .config import AugmentConfig

_TRIES = 10


@dataclass(frozen=True)
class Normalization:
    """How pixels in [0, 1] become the input of the encoder: ``(pixels - mean) / std``."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, pixels: Tensor) -> Tensor:
        """Normalise ``[..., 3, H, W]`` uint8 pixels, as float32."""
        mean, std = (torch.tensor(one, device=pixels.device)[:, None, None] for one in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def joined(image: Tensor, values: Tensor) -> Tensor:
    """A sample as one tensor, so that the loaders of all tasks take it: three channels of the image, and the map."""
    return torch.cat([image, values[None]])  # [4, H, W]


def separate(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The images ``[B, 3, H, W]`` and the maps ``[B, H, W]``, NaN where they are ignored, of :func:`joined` samples."""
    return samples[:, :3], samples[:, 3]


@dataclass(frozen=True)
class WholeImage:
    """The transform of evaluated images: nothing is moved."""

    normalization: Normalization

    def __call__(self, image: Any, values: np.ndarray) -> Tensor:
        """``[4, H, W]`` of a PIL image and its map."""
        return joined(self.normalization.apply(_pixels(image)), torch.from_numpy(values))


@dataclass(frozen=True)
class RandomCrop:
    """The transform of training images: a crop of a random place and size, flips, and a change of colours.

    It draws from PyTorch's generator alone, which :class:`gspn.data.DeterministicAugmentation` seeds. Maps are resized
    by the nearest pixel, so that no class is made up. Where the image is smaller than the crop, the image is continued
    with its mean colour, and the map is ignored.
    """

    size: int
    augment: AugmentConfig
    normalization: Normalization

    def __call__(self, image: Any, values: np.ndarray) -> Tensor:
        """``[4, size, size]`` of a PIL image and its map."""
        width, height = image.size
        box, scale, best = (0, 0, 0, 0), 1.0, -1.0
        for _ in range(_TRIES):
            drawn, by = self._draw(height, width)
            part = values[drawn[0] : drawn[0] + drawn[2], drawn[1] : drawn[1] + drawn[3]]
            labelled = 1 - float(np.isnan(part).mean())
            if labelled > best:
                box, scale, best = drawn, by, labelled
            if labelled >= self.augment.least_labelled:
                break
        top, left, tall, wide = box
        crop = image.crop((left, top, left + wide, top + tall))
        if self.augment.color_jitter:
            strength = self.augment.color_jitter
            crop = require("torchvision.transforms").ColorJitter(strength, strength, strength)(crop)
        part = torch.from_numpy(np.ascontiguousarray(values[top : top + tall, left : left + wide]))
        pixels = _pixels(crop)
        tall, wide = (min(max(1, round(side * scale)), self.size) for side in (tall, wide))
        if pixels.shape[1:] != (tall, wide):
            # Antialiased in float32, whatever the size.
            pixels = F.interpolate(pixels[None].float(), (tall, wide), mode="bilinear", antialias=True)[0]
            pixels = pixels.round_().clamp_(0, 255)
            part = F.interpolate(part[None, None], (tall, wide), mode="nearest-exact")[0, 0]
        sample = joined(self.normalization.apply(pixels), part)
        for axis, probability in ((-1, self.augment.hflip), (-2, self.augment.vflip)):
            if torch.rand(()) < probability:
                sample = sample.flip(axis)
        if (tall, wide) != (self.size, self.size):
            whole = torch.zeros(4, self.size, self.size)
            whole[3] = math.nan
            whole[:, :tall, :wide] = sample
            sample = whole
        return sample.contiguous()

    def _draw(self, height: int, width: int) -> tuple[tuple[int, int, int, int], float]:
        """Row, column, height and width of a crop in the image, and the factor that it is enlarged by."""
        low, high = map(math.log, self.augment.scale)
        scale = math.exp(low + (high - low) * float(torch.rand(())))
        side = max(1, round(self.size / scale))
        tall, wide = min(side, height), min(side, width)
        top, left = (int(torch.randint(most + 1, ())) for most in (height - tall, width - wide))
        return (top, left, tall, wide), self.size / side  # as drawn, but for rounding: a whole side fills the crop


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
