"""The affinity of one point of an image inside a model, and the stability of the model's scans on the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .._errors import UsageError
from .influence import ImageInfluence, image_influence
from .loading import LoadedModel
from .scans import find_scans, position
from .stability import ScanStability, stability_report


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`."""

    image: Tensor
    """``[3, H, W]`` in 0 to 1: the model's input before normalization."""
    affinity: ImageInfluence
    """The affinity of the point, with coordinates in this image."""
    stability: list[ScanStability]
    """The stability of every scan of the model."""
    model: str
    """The name of the model."""
    weights: str
    """The source of its weights."""
    module: str
    """A description of the module: stage and block, channels, the map's size, segment and reference lines, the taps."""


def explain(
    model: LoadedModel, image: Tensor, point: tuple[int, int], *, size: int = 448, stage: int = -1, block: int = -1
) -> Explanation:
    """Compute the affinity of one point of an image inside a model, and the stability of all scans on the image.

    Args:
        model: a model whose token mixers are :class:`gspn.nn.GSPN2d`.
        image: ``[3, H, W]`` in 0 to 1, of any size.
        point: (x, y) in pixels of ``image``.
        size: the longer side in pixels to which the image is scaled first.
        stage: index of the stage whose scan is explained; a negative index counts from the end.
        block: index of the block in that stage; a negative index counts from the end.

    Returns:
        The affinity and the stability.

    Raises:
        UsageError: the point is outside the image, the size is below 1, the model has no scans or no such stage or
            block, or the model needs square images.

    Example:
        >>> import torch
        >>> from gspn.analysis.explain import explain
        >>> from gspn.analysis.loading import load_model
        >>> result = explain(load_model("gspn_pico.untrained"), torch.rand(3, 60, 90), (45, 20), size=48)
        >>> result.affinity.point, result.module  # doctest: +ELLIPSIS
        ((24, 10), 'stage 2, block 3: 192 channels, 4 x 6, global, ...')
    """
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise UsageError(f"{image.shape=}: pass one image, [3, H, W].")
    if size < 1:
        raise UsageError(f"{size=} is below 1; pass the longer side in pixels.")
    height, width = image.shape[1:]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise UsageError(f"{point=} is outside the image of {width} x {height} pixels; pass (x, y), counted from 0.")
    scale = size / max(height, width)
    scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
    seen = F.interpolate(image[None], scaled, mode="bilinear", antialias=True).clamp(0, 1)[0]
    scaled_point = (point[0] * scaled[1] // width, point[1] * scaled[0] // height)

    x = model.normalize(seen)
    affinity = image_influence(model.model, x, scaled_point, stage=stage, block=block)
    scan = find_scans(model.model)[affinity.name]
    rows, columns = affinity.influence.merged.shape
    segment = "global" if scan.segment is None else f"segments of {scan.segment}"
    if scan.reference_lines is not None:
        segment += f", normalized to {scan.reference_lines} lines"
    taps = "taps shared by all channels" if scan.groups == 1 else f"{scan.groups} groups of taps"
    taps = "taps for each channel" if scan.groups == scan.dim else taps
    return Explanation(
        image=seen,
        affinity=affinity,
        stability=stability_report(model.model, x),
        model=model.name,
        weights=model.weights,
        module=f"{position(affinity.name)}: {scan.dim} channels, {rows} x {columns}, {segment}, {taps}",
    )
