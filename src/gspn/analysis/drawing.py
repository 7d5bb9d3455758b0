"""Figures of the results of :mod:`gspn.analysis`; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import require
from .._figures import label as as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .explain import Explanation

INK, MUTED = "#1f2430", "#5b6270"
COLOURS = "inferno"
# The skip makes the point itself so bright that a scale up to it would leave the rest dark. The scale starts at the
# weakest twentieth, but at most MOST_DECADES below its end, as fainter affinities add up to almost nothing.
BRIGHTEST_QUANTILE, FAINTEST_QUANTILE, MOST_DECADES = 0.998, 0.05, 3.5


def draw_explanation(explanation: Explanation, photograph: Tensor | None = None) -> Figure:
    """Draw the image with the point, the affinity of all directions over it, and the affinity of each direction.

    All panels share one logarithmic colour scale between two quantiles of the affinities. Where the affinity is fainter
    or zero, the panel shows the darkened image.

    Args:
        explanation: the result of :func:`gspn.analysis.explain.explain`.
        photograph: the same image at a higher resolution, ``[3, H, W]`` in 0 to 1, as the background.

    Returns:
        The figure; save it with :func:`gspn._figures.save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    influence = explanation.affinity.influence
    image = (explanation.image if photograph is None else photograph).cpu().double()
    height, width = image.shape[1:]
    limits = affinity_limits([influence.merged, *influence.directions.values()])
    point = (
        (explanation.affinity.point[0] + 0.5) * width / explanation.image.shape[2] - 0.5,
        (explanation.affinity.point[1] + 0.5) * height / explanation.image.shape[1] - 0.5,
    )
    count = max(len(influence.directions), 1)
    aspect = min(max(height / width, 0.3), 2.5)
    # In inches: two large panels above, a panel for each direction below, and the scale on the right.
    across, gap, margin, scale, title, label = 10.6, 0.12, 0.3, 1.0, 0.78, 0.28
    large, small = (across - gap) / 2, (across - (count - 1) * gap) / count
    page_width = margin + across + scale
    page_height = title + label + large * aspect + gap + label + small * aspect + margin
    figure = Figure(figsize=(page_width, page_height))

    def panel(left: float, top: float, side: float, heading: str, pixels: Tensor) -> None:
        corner = (left / page_width, 1 - (top + side * aspect) / page_height)
        axis = figure.add_axes((*corner, side / page_width, side * aspect / page_height))
        axis.imshow(pixels.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="antialiased")
        axis.set_title(heading, loc="left", fontsize=11, color=INK, fontweight="bold", pad=4)
        axis.set_axis_off()
        size = 9 if side == large else 6.5
        for colour, edge in (("black", 3), ("white", 1.5)):  # a white ring with a black rim
            axis.plot(*point, "o", markersize=size, mfc="none", markeredgecolor=colour, markeredgewidth=edge)

    top = title + label
    panel(margin, top, large, "the image and the point", image)
    panel(
        margin + large + gap,
        top,
        large,
        "affinity of the point to each pixel",
        overlay(image, influence.merged, limits),
    )
    below = top + large * aspect + gap + label
    for i, (direction, map_) in enumerate(influence.directions.items()):
        panel(margin + i * (small + gap), below, small, direction, overlay(image, map_, limits))

    bottom = below + small * aspect
    bar_corner = ((margin + across + 0.16) / page_width, 1 - bottom / page_height)
    bar_axis = figure.add_axes((*bar_corner, 0.13 / page_width, (bottom - top) / page_height))
    bar = figure.colorbar(
        ScalarMappable(LogNorm(*limits), colormaps[COLOURS]), cax=bar_axis, extend="max", extendfrac=0.025
    )
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    bar.ax.set_title("affinity", fontsize=9.5, color=MUTED, loc="left", pad=6)
    heading = f"{explanation.model}, {explanation.module}"
    details = (
        f"weights: {explanation.weights}   ·   image seen at {explanation.image.shape[2]} x "
        f"{explanation.image.shape[1]}   ·   mean |affinity| over the channels, log scale"
    )
    left, below_top = margin / page_width, 1 - 0.56 / page_height
    figure.text(left, 1 - 0.2 / page_height, as_text(heading), fontsize=14, color=INK, fontweight="bold", va="top")
    figure.text(left, below_top, as_text(details), fontsize=9.5, color=MUTED, va="top")
    return figure


def overlay(image: Tensor, map_: Tensor, limits: tuple[float, float]) -> Tensor:
    """Draw a map of affinities over the darkened image, on a logarithmic colour scale.

    Args:
        image: ``[3, H, W]`` in 0 to 1.
        map_: ``[h, w]``, of any size; it is enlarged to the image's.
        limits: the ends of the colour scale, those of :func:`affinity_limits`. Fainter values show the image alone.

    Returns:
        ``[3, H, W]`` in 0 to 1, float64, on the CPU.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from gspn.analysis.drawing import affinity_limits, overlay
        >>> map_ = torch.rand(4, 6)
        >>> overlay(torch.rand(3, 40, 60), map_, affinity_limits([map_])).shape
        torch.Size([3, 40, 60])
    """
    colours = require("matplotlib", extra="plot").colormaps[COLOURS]
    image = image.cpu().double()
    level = _levels(map_.cpu().double(), *limits, image.shape[1:])  # [H, W], 0 to 1 on the logarithmic scale
    grey = image.mean(0, keepdim=True)
    dimmed = 0.5 * (0.75 * grey + 0.25 * image)
    colour = torch.from_numpy(colours(level.numpy())[..., :3]).permute(2, 0, 1)
    # The photograph shows through everywhere, and more where the affinity is faint, because it explains the shape.
    opacity = 0.8 * (level * 3).clamp(0, 1)
    shaded = colour * (0.8 + 0.2 * grey)
    return dimmed * (1 - opacity) + shaded * opacity


def affinity_limits(maps: Sequence[Tensor]) -> tuple[float, float]:
    """The ends of a colour scale that maps share: quantiles of the affinities that are not zero."""
    values = torch.cat([m.flatten() for m in maps]).cpu().double()
    values = values[values.isfinite() & (values > 0)]
    if not values.numel():
        return 1e-3, 1.0  # all affinities are zero: any scale will do
    # torch.quantile refuses more than 16 million values.
    values = values.sort().values
    low, high = (values[round(q * (len(values) - 1))].item() for q in (FAINTEST_QUANTILE, BRIGHTEST_QUANTILE))
    return min(max(low, high * 10**-MOST_DECADES), high / 10), high


def _levels(map_: Tensor, low: float, high: float, size: Sequence[int]) -> Tensor:
    """The map on a logarithmic scale, 0 at ``low`` and 1 at ``high``, enlarged on that scale, where it is smooth."""
    logs = map_.nan_to_num(0.0).clamp_min(low).log()
    logs = (logs - torch.tensor(low).log()) / torch.tensor(high / low).log()
    return F.interpolate(logs[None, None], list(size), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
