"""Opening images with maps, and what is measured on the training images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._errors import UsageError
from ..._files import short
from ..core.loaders import open_data
from .config import DenseConfig
from .model import Target
from .transforms import Normalization

_SAMPLES = 64  # training images that shares of classes, and mean and deviation of numbers, are measured on
_MOST_WEIGHT = 10.0


def open_split(name: str, split: str, root: Any = None, **options: Any) -> Any:
    """A :class:`gspn.data.MappedImages`.

    Raises:
        UsageError: there is no data set of that name, split or directory.
    """
    return open_data(name, split, root, kind="mapped", **options)


def make_target(dataset: Any, normalization: Normalization, size: int) -> Target:
    """The meaning of a model's outputs for a data set; for numbers, their mean and deviation are measured.

    Raises:
        UsageError: the numbers are all equal or ignored.
    """
    if dataset.unit is None:
        colours = [tuple(one) for one in dataset.map_classes.colours]
        return Target(dataset.classes, colours, None, 0.0, 1.0, normalization, size)
    count, total, square = 0, 0.0, 0.0
    for values in _samples(dataset):
        known = values[~np.isnan(values)].astype(np.float64)
        count, total, square = count + known.size, total + known.sum(), square + (known**2).sum()
    mean = total / max(count, 1)
    std = max(square / max(count, 1) - mean**2, 0.0) ** 0.5
    if not std > 0:
        raise UsageError(f"the maps of data {dataset.name!r} hold no two different numbers ({count:,} are known).")
    # Of a few digits, which a configuration saves and compares.
    return Target([], [], dataset.unit, float(f"{mean:.6g}"), float(f"{std:.6g}"), normalization, size)


def class_weights(config: DenseConfig, dataset: Any) -> Tensor | None:
    """The weights of ``loss.class_weights``, ``[K]``; None where all are equal.

    Raises:
        UsageError: there are more or fewer weights than classes, or the maps hold numbers.
    """
    chosen, classes = config.loss.class_weights, dataset.classes
    if chosen is None:
        return None
    if not classes:
        raise UsageError("loss.class_weights is set, and the maps hold numbers; leave it out.")
    if isinstance(chosen, list):
        if len(chosen) != len(classes):
            raise UsageError(
                f"loss.class_weights is {short(chosen)}, of {len(chosen)} weights; there are {len(classes)} classes."
            )
        return torch.tensor(chosen)
    counts = np.zeros(len(classes))
    for values in _samples(dataset):
        counts += np.bincount(values[~np.isnan(values)].astype(np.int64), minlength=len(classes))
    share = counts / max(counts.sum(), 1)
    weights = np.where(share > 0, 1 / np.sqrt(np.maximum(share, 1e-12)), 0)
    weights = np.where(share > 0, np.minimum(weights / max((weights * share).sum(), 1e-12), _MOST_WEIGHT), 1)
    return torch.tensor([float(f"{one:.4g}") for one in weights])


def _samples(dataset: Any) -> Any:
    """The maps of at most 64 images, evenly spread; those that are corrupt are passed over."""
    from ...data import CorruptImageError

    for i in np.unique(np.linspace(0, len(dataset) - 1, min(_SAMPLES, len(dataset))).round().astype(int)).tolist():
        try:
            yield dataset.map(i)
        except (CorruptImageError, OSError):
            continue  # the loader names it
