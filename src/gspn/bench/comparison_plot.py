"""Images of comparisons: bars for networks, curves for mixers; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .._figures import require_matplotlib
from .comparison import Result
from .report import plain_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e3e6ea"
_OURS = ("#2563a8", "#58a6dd", "#123f73")
_OTHERS = ("#e0a458", "#b5651d", "#8a8f98", "#c9ced6")


def plot_models(results: Sequence[Result], title: str, subtitle: str) -> Figure:
    """Horizontal bars of images a second, a panel for each size, with the ratio to the baseline beside each.

    Args:
        results: of :func:`gspn.bench.models.measure_models`.
        title: the first line.
        subtitle: hardware, batch, dtype.

    Returns:
        The figure; save it with :func:`gspn._figures.save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_type = _figure_type()
    sizes = list(dict.fromkeys(r.height for r in results))
    names = list(dict.fromkeys(r.name for r in results))
    colours = _colours(names)
    figure = figure_type(figsize=(2.4 + 3.9 * len(sizes), 1.7 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for panel, size in zip(panels, sizes, strict=True):
        own = {r.name: r for r in results if r.height == size}
        speeds = {name: own[name].images_per_second or 0.0 for name in names}
        panel.barh(range(len(names)), list(speeds.values()), height=0.72, color=[colours[n] for n in names], zorder=2)
        for place, name in enumerate(names):
            ratio = own[name].ratio
            beside = "" if ratio is None else f"   {ratio:.2f}x"
            text = f"{plain_number(speeds[name])}{beside}" if speeds[name] else "skipped"
            panel.annotate(
                text,
                (speeds[name], place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=9,
                color=INK if speeds[name] else MUTED,
            )
        panel.set_xlim(0, max(*speeds.values(), 1e-9) * 1.5)
        panel.set_title(f"{size} x {size}", loc="left", fontsize=11, color=INK, fontweight="bold")
        panel.set_yticks(range(len(names)), names, fontsize=10)
        panel.grid(axis="x", color=GRID, zorder=0)
        _tidy(panel)
    panels[0].invert_yaxis()
    figure.supxlabel(
        f"images a second at the median; ratio to {results[0].baseline} in the same run", fontsize=9, color=MUTED
    )
    _titles(figure, title, subtitle)
    return figure


def plot_mixers(results: Sequence[Result], exponents: Mapping[str, float], title: str, subtitle: str) -> Figure:
    """Milliseconds over pixels on logarithmic axes, a curve for each candidate, p20 to p80 shaded, with its exponent.

    Args:
        results: of :func:`gspn.bench.mixer.measure_mixers`.
        exponents: of :func:`gspn.bench.mixer.exponents`.
        title: the first line.
        subtitle: hardware, width, dtype.

    Returns:
        The figure; save it with :func:`gspn._figures.save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_type = _figure_type()
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = list(dict.fromkeys(r.name for r in results))
    colours = _colours(names)
    figure = figure_type(figsize=(8.2, 5.2), layout="constrained")
    axis = figure.subplots()
    sides = sorted({r.height for r in results if r.timing is not None})
    for name in names:
        own = [r for r in results if r.name == name and r.timing is not None]
        if not own:
            continue
        pixels = [r.height * r.width for r in own]
        low, mid, high = ([r.timing.quantile(q) for r in own if r.timing is not None] for q in (0.2, 0.5, 0.8))
        axis.fill_between(pixels, low, high, color=colours[name], alpha=0.18, linewidth=0)
        grown = f": time ~ pixels$^{{{exponents[name]:.2f}}}$" if name in exponents else ""
        axis.plot(pixels, mid, "-o", color=colours[name], linewidth=2, markersize=4.5, label=name + grown)
    axis.legend(loc="upper left", frameon=False, fontsize=10.5, labelcolor=INK)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator([side * side for side in sides]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value**0.5)}²"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(color=GRID, zorder=0)
    _tidy(axis)
    axis.set_xlabel("pixels of the map", fontsize=9.5, color=MUTED)
    axis.set_ylabel("milliseconds a call", fontsize=9.5, color=MUTED)
    _titles(figure, title, subtitle)
    return figure


def _figure_type() -> type[Figure]:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Blues for GSPN, others for the rest, each used again where there are too many."""
    ours = [name for name in names if name.lower().startswith(("gspn", "propagate"))]
    others = [name for name in names if name not in ours]
    return {name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)} | {
        name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)
    }


def _tidy(axis: Axes) -> None:
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=INK, labelsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13.5, color=INK, fontweight="bold", linespacing=1.5)
    figure.text(0.012, 1 - 0.44 / figure.get_figheight(), subtitle, fontsize=9.5, color=MUTED, va="top")
