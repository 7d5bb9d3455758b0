"""The image transform that all generative tasks share."""

from __future__ import annotations

from typing import Any

from ..._errors import require


def image_transform(size: int, channels: int = 3, *, crop: int | None = None, hflip: float = 0.0) -> Any:
    """A transform from a PIL image to a tensor ``[channels, size, size]`` in [-1, 1].

    The shorter side is resized to ``size`` and the centre is cropped.

    Args:
        size: Height and width in pixels.
        channels: 3, or 1 for grey images.
        crop: Side of a random crop of the result; None for all of it.
        hflip: Probability of mirroring the image.
    """
    require("torchvision")
    from torchvision import transforms

    steps: list[Any] = [
        transforms.Lambda(_prepared),
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(size),
    ]
    if channels == 1:
        steps.append(transforms.Grayscale())
    if crop is not None:
        steps.append(transforms.RandomCrop(crop))
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])


# A named function, which worker processes can unpickle.
def _prepared(image: Any) -> Any:
    data = require("gspn.data")
    return data.trimmed(data.to_rgb(image))
