"""Prediction of whole images and of images of any size by windows, in bounded memory."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..._errors import UsageError
from .model import DenseModel

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """How an image is predicted: by windows of ``size`` x ``size`` pixels, 0 for the whole image at once.

    Where windows overlap, their outputs are averaged with weights that fall off linearly to the windows' edges, so that
    the transition has no seam.

    Raises:
        UsageError: a value out of range.

    Example:
        >>> Windows(256, 0.25).starts(600)
        [0, 172, 344]
    """

    size: int
    overlap: float = 0.25
    batch_size: int = 4
    """Windows in one forward pass."""

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.overlap <= 0.75 or self.batch_size < 1:
            raise UsageError(
                f"windows of {self.size} pixels, overlap {self.overlap:g}, {self.batch_size} at a time: the overlap "
                "has to be between 0 and 0.75, and the others positive."
            )

    def starts(self, length: int) -> list[int]:
        """The first pixels of the windows along a side, evenly spaced."""
        if not self.size or length <= self.size:
            return [0]
        step = max(1, int(self.size * (1 - self.overlap)))
        count = -(-(length - self.size) // step) + 1
        return [round(i * (length - self.size) / (count - 1)) for i in range(count)]


@torch.inference_mode()
def predict_rows(
    image: NDArray[np.uint8] | Tensor, model: DenseModel, windows: Windows, *, device: torch.device,
    forward: Forward | None = None, advance: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """The outputs of a model for an image, from the top, as ``(first row, [K, rows, W])`` in float32.

    The rows under one row of windows are held at a time, so the memory is ``K x window x W`` numbers whatever the
    height of the image. They are on the device.

    Args:
        image: ``[H, W, 3]`` uint8, or ``[3, H, W]`` normalised.
        model: The model, on the device, in evaluation mode.
        windows: The windows.
        device: The device.
        forward: What is called in place of the model, such as a wrapper that computes in another precision.
        advance: Called with the number of windows that are done.

    Raises:
        UsageError: the encoder does not take windows of this size.
    """
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    call = model if forward is None else forward
    tall, wide = (min(windows.size or side, side) for side in (height, width))
    tops, lefts = windows.starts(height), windows.starts(width)
    weight = _weight(tall, wide, device)
    batch = windows.batch_size if windows.size else 1
    held = torch.zeros(0)
    weights = torch.zeros(0)
    for i, top in enumerate(tops):
        band = torch.zeros(model.target.outputs + 1, tall, width, device=device)
        if i:
            kept = tops[i - 1] + tall - top
            band[:-1, :kept], band[-1, :kept] = held[:, tall - kept :], weights[tall - kept :]
        for first in range(0, len(lefts), batch):
            some = lefts[first : first + batch]
            inputs = torch.stack([_window(image, top, left, tall, wide, model, device) for left in some])
            try:
                outputs = call(inputs).float()  # [B, K, tall, wide]
            except (AssertionError, ValueError) as error:  # timm's, of an encoder that is built for one size
                reason = textwrap.shorten(" ".join(str(error).split()), 200)
                raise UsageError(
                    f"the model does not take {tall} x {wide} pixels at a time, of an image of {height} x {width}: "
                    f"{reason} Set the window to the size of the training, and leave out smaller images."
                ) from error
            for left, output in zip(some, outputs, strict=True):
                band[:-1, :, left : left + wide] += output * weight
                band[-1, :, left : left + wide] += weight
            if advance is not None:
                advance(len(some))
        held, weights = band[:-1], band[-1]
        ready = tops[i + 1] - top if i + 1 < len(tops) else tall
        yield top, held[:, :ready] / weights[:ready]


def _window(
    image: NDArray[np.uint8] | Tensor, top: int, left: int, tall: int, wide: int, model: DenseModel,
    device: torch.device,
) -> Tensor:  # fmt: skip
    if isinstance(image, Tensor):
        return image[:, top : top + tall, left : left + wide].to(device)
    part = torch.from_numpy(np.array(image[top : top + tall, left : left + wide])).to(device)
    return model.target.normalization.apply(part.permute(2, 0, 1))


def _weight(tall: int, wide: int, device: torch.device) -> Tensor:
    rows, columns = (
        torch.minimum(torch.arange(1, side + 1), torch.arange(side, 0, -1)).float() / side for side in (tall, wide)
    )
    return (rows[:, None] * columns).to(device)


def to_map(outputs: Tensor, model: DenseModel) -> Tensor:
    """The classes ``[rows, W]`` int64, or the numbers in float32, of outputs ``[K, rows, W]``."""
    target = model.target
    return outputs.argmax(0) if target.classes else outputs[0] * target.std + target.mean


def predict_map(image: NDArray[np.uint8] | Tensor, model: DenseModel, windows: Windows, **options: Any) -> Tensor:
    """The map of an image ``[H, W]``, on the CPU: classes (int64) or numbers (float32). See :func:`predict_rows`.

    Example:
        >>> from gspn.tasks.dense.config import ModelConfig
        >>> from gspn.tasks.dense.model import Target, build_model
        >>> from gspn.tasks.dense.transforms import Normalization
        >>> normalization = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> target = Target(["water", "land"], [(0, 0, 255), (0, 128, 0)], None, 0.0, 1.0, normalization, 64)
        >>> model = build_model(ModelConfig(name="resnet10t", decoder="Unet"), target).eval()  # doctest: +SKIP
        >>> image = np.zeros((100, 150, 3), np.uint8)
        >>> predict_map(image, model, Windows(64), device=torch.device("cpu")).shape  # doctest: +SKIP
        torch.Size([100, 150])
    """
    rows = [to_map(outputs, model).cpu() for _, outputs in predict_rows(image, model, windows, **options)]
    return torch.cat(rows)
