"""The confusion matrix as an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..._errors import UsageError, require
from ..._figures import label, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .evaluation import Evaluation

_INK, _MUTED, _GRID = "#22272e", "#6b7280", "#e5e7eb"
# With more classes, numbers in the cells and names at the sides are too small to be read.
_MOST_NUMBERS = 25
_MOST_NAMES = 110


def plot_confusion(evaluation: Evaluation) -> Figure:
    """Plot the confusion matrix: rows are classes, columns are predictions; each row sums to 100 %.

    Correct predictions are blue and wrong ones red, on one scale of darkness, so that both stand out equally.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    counts = np.asarray(evaluation.confusion, dtype=float)  # [K, K]
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    classes = len(counts)
    numbered, named = classes <= _MOST_NUMBERS, classes <= _MOST_NAMES
    side = min(max(4.2, 0.42 * classes), 7.0) if numbered else min(max(8.0, 0.13 * classes), 16.0)
    longest = max(map(len, evaluation.classes)) if named else 0
    size = 9.0 if numbered else min(9.0, 0.62 * 72 * side / classes)
    room = 0.6 * size / 72 * min(longest, 28)  # inches that names take
    figure = Figure(figsize=(side + room + 0.9, side + room + 1.3), layout="constrained")
    axes = figure.subplots()

    right = LinearSegmentedColormap.from_list("right", ["#ffffff", "#9cc3e6", "#1f5a99"])
    wrong = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#f0a58f", "#b3261e"])
    # The square root lets a confusion of 1 % be seen.
    shade = np.sqrt(rates)
    colours = np.where(np.eye(classes, dtype=bool)[..., None], right(shade), wrong(shade))
    axes.imshow(colours, interpolation="nearest", aspect="equal")
    if numbered:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shade[i, j] > 0.72 else _INK
                small = 9.0 if classes <= 12 else 6.5
                axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=small, color=colour)
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=_GRID, linewidth=0.8)
    else:
        # Lines to count from.
        for line in range(5, classes, 5):
            axes.axhline(line - 0.5, color=_GRID, linewidth=0.5)
            axes.axvline(line - 0.5, color=_GRID, linewidth=0.5)
    if named:
        names = [label(name if len(name) <= 28 else name[:27] + "…") for name in evaluation.classes]
        upright = numbered and longest <= 3
        axes.set_xticks(range(classes), names, rotation=0 if upright else 90, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.tick_params(which="both", length=0, labelcolor=_INK)
    axes.set_xlabel("predicted class", color=_MUTED)
    axes.set_ylabel("true class", color=_MUTED)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.set_title(
        # Two lines: the image of ten classes is narrower than one.
        f"{label(_short_name(evaluation.model))} on {label(f'{evaluation.data}/{evaluation.split}')}\n"
        f"top-1 {evaluation.top1:.2f} % of {evaluation.images:,} images",
        loc="left",
        color=_INK,
        fontsize=11,
        fontweight="bold",
    )
    return figure


def save_confusion(evaluation: Evaluation, path: Path, dpi: int = 160) -> None:
    """Write the image, replacing the file as a whole.

    Raises:
        UsageError: the name does not end in .png, .pdf or .svg.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"{str(path)!r} does not end in .png, .pdf or .svg.")
    save_figure(plot_confusion(evaluation), path, dpi)


def _short_name(model: str) -> str:
    path = Path(model)
    return path.parent.name if path.name in ("best", "last") and path.parent.name else path.name
