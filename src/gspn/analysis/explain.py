"""One image, one point, one network: what the point takes from the rest, and whether the scans are stable."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .influence import ImageInfluence, image_influence
from .networks import Network
from .scans import find_scans
from .stability import ScanStability, stability_report


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found."""

    image: Tensor
    """``[3, H, W]`` in 0 to 1, as the network saw it but for the normalisation."""
    found: ImageInfluence
    """The affinity of the point; its point is one of this image."""
    stability: list[ScanStability]
    network: str
    weights: str
    module: str
    """What the module is, in words: stage and block, channels, the map's size, the segment, the taps."""


def explain(
    network: Network, image: Tensor, point: tuple[int, int], *, size: int = 448, stage: int = -1, block: int = -1
) -> Explanation:
    """The affinity of one point of an image inside a network, and the stability of all its scans on it.

    Args:
        network: a network whose token mixers are :class:`gspn.nn.GSPN2d`.
        image: ``[3, H, W]`` in 0 to 1, of any size.
        point: (x, y) in pixels of ``image``.
        size: the longer side, to which the image is scaled before the network sees it.
        stage: which stage's scan to look at, from 0, or from the end if negative.
        block: which of the stage's blocks, likewise.

    Returns:
        What was found.

    Raises:
        ValueError: the point lies outside the image, the size is below 1, the network has no scans or no such stage
            or block, or is one of those that need square images.

    Example:
        >>> import torch
        >>> from gspn.analysis.explain import explain
        >>> from gspn.analysis.networks import open_network
        >>> found = explain(open_network("gspn_pico.untrained"), torch.rand(3, 60, 90), (45, 20), size=48)
        >>> found.found.point, found.module  # doctest: +ELLIPSIS
        ((24, 10), 'stage 2, block 3: 192 channels, 4 x 6, global, ...')
    """
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"{image.shape=}: pass one image, [3, H, W].")
    if size < 1:
        raise ValueError(f"{size=} is below 1; it is the longer side in pixels.")
    height, width = image.shape[1:]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f"{point=} lies outside the image of {width} x {height} pixels; it is (x, y), from 0.")
    scale = size / max(height, width)
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    seen = F.interpolate(image[None], small, mode="bilinear", antialias=True).clamp(0, 1)[0]
    at = (point[0] * small[1] // width, point[1] * small[0] // height)

    x = network.normalised(seen)
    found = image_influence(network.model, x, at, stage=stage, block=block)
    scan = find_scans(network.model)[found.name]
    rows, columns = found.influence.merged.shape
    taps = "taps shared by all channels" if scan.groups == 1 else f"{scan.groups} sets of taps"
    words = [
        f"{scan.dim} channels",
        f"{rows} x {columns}",
        "global" if scan.segment is None else f"segments of {scan.segment}",
        "taps for each channel" if scan.groups == scan.dim else taps,
    ]
    return Explanation(
        image=seen,
        found=found,
        stability=stability_report(network.model, x),
        network=network.name,
        weights=network.weights,
        module=f"{_place(found.name)}: {', '.join(words)}",
    )


def _place(name: str) -> str:
    """``stage 2, block 3`` for a module of a stage's block, counted from 0 as in the network."""
    parts = name.split(".")
    if len(parts) > 3 and parts[0] == "stages" and parts[2] == "blocks":
        return f"stage {parts[1]}, block {parts[3]}"
    return name
