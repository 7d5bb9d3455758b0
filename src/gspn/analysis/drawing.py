"""Images of what :mod:`gspn.analysis` finds; needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .._figures import require_matplotlib
from .explain import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = "#1f2430", "#5b6270"
COLOURS = "inferno"
# A scale up to the point itself, which the skip adds to, would leave the rest dark. The scale begins at the weakest
# twentieth, or so many decades below its end: what is fainter adds up to nothing.
BRIGHTEST_QUANTILE, FAINTEST_QUANTILE, MOST_DECADES = 0.998, 0.05, 3.5


def draw_explanation(explanation: Explanation, photograph: Tensor | None = None) -> Figure:
    """The image with the point, the affinity of all directions over it, and each direction's.

    Colours are on a logarithmic scale that all panels share, between two quantiles of the affinities there are; what is
    fainter, or cannot be reached, shows the darkened image alone.

    Args:
        explanation: what :func:`gspn.analysis.explain.explain` found.
        photograph: the same image at a better resolution, ``[3, H, W]`` in 0 to 1, to draw on.

    Returns:
        The figure; save it with :func:`gspn._figures.save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    found = explanation.found.influence
    image = (explanation.image if photograph is None else photograph).cpu().double()
    height, width = image.shape[1:]
    low, high = _limits([found.merged, *found.directions.values()])
    colours = colormaps[COLOURS]
    grey = image.mean(0, keepdim=True)
    dimmed = 0.5 * (0.75 * grey + 0.25 * image)

    def overlaid(map_: Tensor) -> Tensor:
        level = _levels(map_.cpu().double(), low, high, (height, width))  # [H, W], 0 to 1 on the logarithmic scale
        colour = torch.from_numpy(colours(level.numpy())[..., :3]).permute(2, 0, 1)
        # The fainter the more of the photograph is seen, and it is seen everywhere: it explains the shape.
        opacity = 0.8 * (level * 3).clamp(0, 1)
        shaded = colour * (0.8 + 0.2 * grey)
        return dimmed * (1 - opacity) + shaded * opacity

    point = (
        (explanation.found.point[0] + 0.5) * width / explanation.image.shape[2] - 0.5,
        (explanation.found.point[1] + 0.5) * height / explanation.image.shape[1] - 0.5,
    )
    count = max(len(found.directions), 1)
    aspect = min(max(height / width, 0.3), 2.5)
    # All in inches: two large panels above, one a direction below, and the scale on the right.
    across, gap, margin, scale, title, label = 10.6, 0.12, 0.3, 1.0, 0.78, 0.28
    large, small = (across - gap) / 2, (across - (count - 1) * gap) / count
    page_width = margin + across + scale
    page_height = title + label + large * aspect + gap + label + small * aspect + margin
    figure = Figure(figsize=(page_width, page_height))

    def panel(left: float, top: float, side: float, heading: str, pixels: Tensor) -> None:
        place = (left / page_width, 1 - (top + side * aspect) / page_height)
        axis = figure.add_axes((*place, side / page_width, side * aspect / page_height))
        axis.imshow(pixels.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="antialiased")
        axis.set_title(heading, loc="left", fontsize=11, color=INK, fontweight="bold", pad=4)
        axis.set_axis_off()
        _mark(axis, point, 9 if side == large else 6.5)

    top = title + label
    panel(margin, top, large, "the image and the point", image)
    panel(margin + large + gap, top, large, "what the point takes from each pixel", overlaid(found.merged))
    below = top + large * aspect + gap + label
    for i, (direction, map_) in enumerate(found.directions.items()):
        panel(margin + i * (small + gap), below, small, direction, overlaid(map_))

    bar_axis = figure.add_axes(
        (
            (margin + across + 0.16) / page_width,
            1 - (below + small * aspect) / page_height,
            0.13 / page_width,
            (below + small * aspect - top) / page_height,
        )
    )
    bar = figure.colorbar(ScalarMappable(LogNorm(low, high), colours), cax=bar_axis, extend="max", extendfrac=0.025)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    bar.ax.set_title("affinity", fontsize=9.5, color=MUTED, loc="left", pad=6)
    left = margin / page_width
    figure.text(
        left,
        1 - 0.2 / page_height,
        f"{explanation.network}, {explanation.module}",
        fontsize=14,
        color=INK,
        fontweight="bold",
        va="top",
    )
    figure.text(
        left,
        1 - 0.56 / page_height,
        f"weights: {explanation.weights}   ·   image seen at {explanation.image.shape[2]} x "
        f"{explanation.image.shape[1]}   ·   mean |affinity| over the channels, log scale",
        fontsize=9.5,
        color=MUTED,
        va="top",
    )
    return figure


def _limits(maps: list[Tensor]) -> tuple[float, float]:
    """The scale's ends: quantiles of the affinities that are not zero."""
    values = torch.cat([m.flatten() for m in maps]).cpu().double()
    values = values[values.isfinite() & (values > 0)]
    if not values.numel():
        return 1e-3, 1.0  # nothing reaches anything: any scale will do
    # Not torch.quantile, which refuses more than 16 million values.
    values = values.sort().values
    low, high = (values[round(q * (len(values) - 1))].item() for q in (FAINTEST_QUANTILE, BRIGHTEST_QUANTILE))
    return min(max(low, high * 10**-MOST_DECADES), high / 10), high


def _levels(map_: Tensor, low: float, high: float, size: tuple[int, int]) -> Tensor:
    """0 at ``low`` to 1 at ``high`` on the logarithmic scale, enlarged on that scale, where the map is smooth."""
    logs = map_.nan_to_num(0.0).clamp_min(low).log()
    logs = (logs - torch.tensor(low).log()) / torch.tensor(high / low).log()
    return F.interpolate(logs[None, None], size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)


def _mark(axis: Axes, point: tuple[float, float], size: float) -> None:
    axis.plot(*point, "o", markersize=size, markerfacecolor="none", markeredgecolor="black", markeredgewidth=3)
    axis.plot(*point, "o", markersize=size, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.5)
