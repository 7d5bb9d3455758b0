"""Metrics of maps: sums over pixels, which add up over images and processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._errors import require

DISTANCES = (1, 2, 4, 8, 16, 32)
"""The upper ends, in pixels, of the ranges of distances from a border; the last range has none."""


@dataclass(frozen=True)
class ClassScores:
    """The scores of predicted classes, in percent; a class that neither occurs nor is predicted has none."""

    miou: float
    """Mean intersection over union of the classes that have one."""
    accuracy: float
    """Share of the labelled pixels that are right."""
    iou: tuple[float | None, ...]
    """Of each class."""
    by_distance: Mapping[str, float | None]
    """Accuracy by the distance of a pixel from the nearest pixel of another class, in pixels."""
    confusion: tuple[tuple[int, ...], ...]
    """``confusion[i][j]`` pixels of class i were predicted as class j."""
    pixels: int


@dataclass(frozen=True)
class NumberScores:
    """The scores of predicted numbers."""

    mae: float
    """Mean absolute error."""
    rmse: float
    """Root of the mean squared error."""
    abs_rel: float
    """Mean of the absolute error over the true number's magnitude, for numbers of at least 1."""
    delta1: float
    """Percent of those numbers that are wrong by a factor of less than 1.25."""
    pixels: int


class ClassSums:
    """Counts of predicted classes."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        # Pairs of classes; then, for each range of distances, its pixels and how many of them are right.
        self.sums = torch.zeros(classes * classes + 2 * (len(DISTANCES) + 1), dtype=torch.float64)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Count a map ``[H, W]`` of predicted classes, for a target with NaN where it is ignored."""
        confusion = require("torchmetrics.functional.classification").multiclass_confusion_matrix
        counts = ~target.isnan()
        if not counts.any():
            return
        truth = target.nan_to_num(0).long()
        pairs = confusion(predicted[counts], truth[counts], self.classes, validate_args=False)  # [K, K]
        self.sums[: pairs.numel()] += pairs.flatten().double()
        right, left = predicted == truth, counts
        place = pairs.numel()
        for near in [*near_border(target, DISTANCES), counts]:
            inside = left & near
            self.sums[place] += inside.sum()
            self.sums[place + 1] += (inside & right).sum()
            left, place = left & ~near, place + 2

    def scores(self, sums: Sequence[float]) -> ClassScores:
        """The scores of sums, perhaps added up over processes."""
        size = self.classes**2
        confusion = torch.tensor(sums[:size], dtype=torch.float64).reshape(self.classes, self.classes)
        hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = [100 * float(hit / whole) if whole else None for hit, whole in zip(hits, union, strict=True)]
        known = [one for one in iou if one is not None]
        pixels = float(confusion.sum())
        ranges = list(zip(sums[size::2], sums[size + 1 :: 2], strict=True))
        return ClassScores(
            miou=sum(known) / max(len(known), 1),
            accuracy=100 * float(hits.sum()) / max(pixels, 1),
            iou=tuple(iou),
            by_distance={name: 100 * right / count if count else None
                         for name, (count, right) in zip(range_names(), ranges, strict=True)},
            confusion=tuple(tuple(int(value) for value in row) for row in confusion.tolist()),
            pixels=int(pixels),
        )  # fmt: skip


class NumberSums:
    """Sums over predicted numbers."""

    def __init__(self) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Count a map ``[H, W]`` of predicted numbers, for a target with NaN where it is ignored."""
        counts = ~target.isnan()
        truth, guess = target[counts].double(), predicted[counts].double()
        error = (guess - truth).abs()
        large = truth.abs() >= 1
        ratio = (guess / truth)[large]
        close = torch.maximum(ratio, 1 / ratio) < 1.25  # never for another sign
        self.sums += torch.stack([
            counts.sum().double(), error.sum(), error.square().sum(), large.sum().double(),
            (error / truth.abs())[large].sum(), (close & (ratio > 0)).sum().double(),
        ])  # fmt: skip

    def scores(self, sums: Sequence[float]) -> NumberScores:
        """The scores of sums, perhaps added up over processes."""
        count, error, square, large, relative, close = sums
        count, large = max(count, 1), max(large, 1)
        return NumberScores(error / count, (square / count) ** 0.5, relative / large, 100 * close / large, int(sums[0]))


def range_names() -> list[str]:
    """The names of the ranges of distances.

    Example:
        >>> range_names()
        ['1', '2', '3-4', '5-8', '9-16', '17-32', 'over 32']
    """
    names = [f"{low + 1}-{high}" if high > low + 1 else str(high) for low, high in zip((0, *DISTANCES), DISTANCES)]  # noqa: B905
    return [*names, f"over {DISTANCES[-1]}"]


def near_border(target: Tensor, distances: Sequence[int]) -> Iterator[Tensor]:
    """Where a pixel of another class is within so many pixels, diagonal steps counted as one: ``[H, W]``, bool.

    Ignored pixels are of no class and make no border.

    Args:
        target: A map ``[H, W]`` of classes, NaN where it is ignored.
        distances: In rising order; there is one result for each.

    Example:
        >>> [near.tolist() for near in near_border(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), (1, 2))]
        [[[False, False, True, True]], [[False, True, True, True]]]
    """
    known = ~target.isnan()
    # The largest class within the distance differs from the smallest.
    high, low, reached = target.nan_to_num(-torch.inf), target.nan_to_num(torch.inf), 0
    for distance in distances:
        # What is largest in a square is the largest of squares within it, so each distance starts from the last.
        high, low = _largest(high, distance - reached), -_largest(-low, distance - reached)
        reached = distance
        yield (high > low) & known


def _largest(values: Tensor, distance: int) -> Tensor:
    for kernel, padding in (((2 * distance + 1, 1), (distance, 0)), ((1, 2 * distance + 1), (0, distance))):
        values = F.max_pool2d(values[None, None], kernel, 1, padding)[0, 0]
    return values


def make_sums(target: Any) -> ClassSums | NumberSums:
    """The sums for the outputs of a model's ``target``."""
    return ClassSums(len(target.classes)) if target.classes else NumberSums()
