"""Results of benchmarks: the CSV with one row each, and their plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gspn._errors import require
from gspn._files import replaced

from .environment import Environment
from .timing import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .unet_table import Total

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One candidate in one case, beside the baseline of the same run."""

    name: str
    """The candidate."""
    mode: str
    batch: int
    height: int
    width: int
    dtype: torch.dtype
    timing: Timing | None
    """None if the candidate was skipped."""
    baseline: str
    """The candidate that ``ratio`` refers to."""
    baseline_ms: float | None = None
    """The median of the baseline; None without one."""
    peak_bytes: int | None = None
    """The memory that one call takes beyond its arguments and weights; None where the system does not report it."""
    skipped: str = ""
    """The reason why there is no time."""
    details: Mapping[str, Cell] = field(default_factory=dict)
    """The columns that only this benchmark has."""

    @property
    def ratio(self) -> float | None:
        """The baseline's median over this one: above 1 is faster than the baseline."""
        return None if self.timing is None or self.baseline_ms is None else self.baseline_ms / self.timing.p50

    @property
    def images_per_second(self) -> float | None:
        """Images, or maps, a second at the median."""
        return None if self.timing is None else self.batch / self.timing.p50 * 1e3

    def row(self) -> dict[str, Cell]:
        """The measured columns, with numbers to five significant digits: more than a clock is good for."""
        timing = self.timing
        cells: dict[str, Cell] = {
            "name": self.name,
            "mode": self.mode,
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "dtype": dtype_name(self.dtype),
            **{f"p{q}_ms": None if timing is None else timing.quantile(q / 100) for q in (20, 50, 80)},
            "samples": 0 if timing is None else len(timing.samples_ms),
            "images_per_second": self.images_per_second,
            "peak_memory_mb": None if self.peak_bytes is None else self.peak_bytes / 1e6,
            "baseline": self.baseline,
            "speedup_over_baseline": self.ratio,
            "skipped": self.skipped,
            **self.details,
        }
        return {key: float(f"{cell:.5g}") if isinstance(cell, float) else cell for key, cell in cells.items()}


COLUMNS = (
    *("bench", "name", "mode", "batch", "height", "width", "dtype", "params", "macs", "attention"),
    *("p20_ms", "p50_ms", "p80_ms", "samples", "images_per_second", "peak_memory_mb"),
    *("baseline", "speedup_over_baseline", "skipped"),
)
"""The measured columns of a CSV; ``line_scan`` has its own. The environment and the date follow."""


def write_csv(
    path: Path, results: Sequence[Result], environment: Environment, columns: Iterable[str] = COLUMNS
) -> None:
    """Write one row for each result, replacing the file as a whole or not at all.

    Args:
        path: the CSV; its directory is created if needed.
        results: the results of one benchmark.
        environment: the machine that they were measured on.
        columns: the measured columns, in order.

    Raises:
        ValueError: there are no results.
        OSError: the file cannot be written.
    """
    if not results:
        raise ValueError("there are no results to write.")
    shared = {**asdict(environment), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *shared], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**result.row(), **shared} for result in results)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def plain_number(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, with trailing zeros and never with an exponent.

    Example:
        >>> plain_number(2.8), plain_number(30511.2), plain_number(0.0264)
        ('2.80', '30,511', '0.0264')
    """
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(digits - before, 0)}f}"


# --- Plots ------------------------------------------------------------------------------------------------------------

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e3e6ea"
_OURS = ("#2563a8", "#58a6dd", "#123f73")
_OTHERS = ("#e0a458", "#b5651d", "#8a8f98", "#c9ced6")
_IMPLEMENTATIONS = {"reference": "#c9ced6", "line-per-launch": "#e0a458"}


def plot_fractions(results: Sequence[Result], title: str, subtitle: str) -> Figure:
    """Horizontal bars of the fraction of copy bandwidth: a panel for each mode, a group for each direction.

    The results are those of :func:`gspn.bench.line_scan.measure`; the subtitle states hardware, shape and dtype.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    from matplotlib.ticker import PercentFormatter

    modes = list(dict.fromkeys(r.mode for r in results))
    directions = list(dict.fromkeys(r.details["direction"] for r in results))
    impls = list(dict.fromkeys(r.name for r in results))
    thick = 0.8 / len(impls)
    rows = len(directions) * len(impls)
    longest = max(1.0, *(_number(r.details["fraction_of_copy"]) for r in results))

    size = (4.6 + 4.2 * len(modes), 1.9 + 0.26 * rows + 0.16 * len(directions))
    figure, panels = _bar_panels(size, modes, directions)
    label: dict[str, Any] = {
        "textcoords": "offset points", "fontsize": 9, "va": "center_baseline", "zorder": 3,
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},  # so that no grid line runs through a number
    }  # fmt: skip
    bars: dict[str, Any] = {}
    for panel, mode in zip(panels, modes, strict=True):
        for i, impl in enumerate(impls):
            own = [r for r in results if r.mode == mode and r.name == impl]
            positions = [directions.index(r.details["direction"]) + (i - (len(impls) - 1) / 2) * thick for r in own]
            fractions = [_number(r.details["fraction_of_copy"]) for r in own]
            colour = _IMPLEMENTATIONS.get(impl, _OURS[0])
            drawn = panel.barh(positions, fractions, height=0.88 * thick, color=colour, zorder=2)
            if own:  # an implementation may have one mode alone
                bars.setdefault(impl, drawn)
            for position, r, fraction in zip(positions, own, fractions, strict=True):
                percent = f"{fraction:.0%}" if fraction >= 0.095 else f"{fraction:.1%}"
                at = panel.annotate(
                    percent, (fraction, position), xytext=(6, 0), color=INK, fontweight="bold", **label
                )  # fmt: skip
                ms = "" if r.timing is None else f"{plain_number(r.timing.p50)} ms"
                panel.annotate(ms, (1, 0.5), xycoords=at, xytext=(6, 0), color=MUTED, **label)
        panel.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        panel.annotate(
            "copy", (1, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points", ha="center",
            fontsize=9, color=INK,
        )  # fmt: skip
        panel.set_xlim(0, longest * 1.3)
        panel.set_xticks([t / 4 for t in range(int(longest * 4) + 1)])
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    speeds = ", ".join(dict.fromkeys(plain_number(_number(r.details["copy_gbs"])) for r in results))
    below = f"bytes that have to move over time, as a fraction of what a copy reaches in the same run ({speeds} GB/s)"
    figure.supxlabel(below, fontsize=9, color=MUTED)
    _add_titles(figure, title, subtitle)
    legend = figure.legend(
        list(bars.values()), list(bars), loc="upper right", bbox_to_anchor=(0.99, 1 - 0.06 / figure.get_figheight()),
        ncols=len(bars), frameon=False, fontsize=10, labelcolor=INK, columnspacing=1.4, handlelength=1.2,
    )  # fmt: skip
    legend.set_in_layout(False)  # it stands in the title's line
    return figure


def plot_models(results: Sequence[Result], title: str, subtitle: str) -> Figure:
    """Horizontal bars of images a second, a panel for each size, with the ratio to the baseline beside each.

    The results are those of :func:`gspn.bench.models.measure_models`; the subtitle states hardware, batch and dtype.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    sizes = list(dict.fromkeys(r.height for r in results))
    names = list(dict.fromkeys(r.name for r in results))
    colours = _colours(names)
    titles = [f"{size} x {size}" for size in sizes]
    figure, panels = _bar_panels((2.4 + 3.9 * len(sizes), 1.7 + 0.42 * len(names)), titles, names)
    for panel, size in zip(panels, sizes, strict=True):
        own = {r.name: r for r in results if r.height == size}
        speeds = {name: own[name].images_per_second or 0.0 for name in names}
        panel.barh(range(len(names)), list(speeds.values()), height=0.72, color=[colours[n] for n in names], zorder=2)
        for position, name in enumerate(names):
            ratio = own[name].ratio
            beside = "" if ratio is None else f"   {ratio:.2f}x"
            panel.annotate(
                f"{plain_number(speeds[name])}{beside}" if speeds[name] else "skipped",
                (speeds[name], position), xytext=(5, 0), textcoords="offset points", va="center_baseline", fontsize=9,
                color=INK if speeds[name] else MUTED,
            )  # fmt: skip
        panel.set_xlim(0, max(*speeds.values(), 1e-9) * 1.5)
    below = f"images a second at the median; ratio to {results[0].baseline} in the same run"
    figure.supxlabel(below, fontsize=9, color=MUTED)
    _add_titles(figure, title, subtitle)
    return figure


def plot_sweep(results: Sequence[Result], exponents: Mapping[str, float], title: str, subtitle: str) -> Figure:
    """Milliseconds over pixels on logarithmic axes: a curve for each candidate, p20 to p80 shaded, with its exponent.

    The results are those of :meth:`gspn.bench.size_sweep.SizeSweep.measure`, and the exponents those of
    :func:`gspn.bench.size_sweep.exponents`; the subtitle states hardware, width and dtype.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = list(dict.fromkeys(r.name for r in results))
    colours = _colours(names)
    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axis = figure.subplots()
    for name in names:
        timed = [(r.height * r.width, r.timing) for r in results if r.name == name and r.timing is not None]
        if not timed:
            continue
        pixels = [size for size, _ in timed]
        low, mid, high = ([timing.quantile(q) for _, timing in timed] for q in (0.2, 0.5, 0.8))
        axis.fill_between(pixels, low, high, color=colours[name], alpha=0.18, linewidth=0)
        growth = f": time ~ pixels$^{{{exponents[name]:.2f}}}$" if name in exponents else ""
        axis.plot(pixels, mid, "-o", color=colours[name], linewidth=2, markersize=4.5, label=name + growth)
    axis.legend(loc="upper left", frameon=False, fontsize=10.5, labelcolor=INK)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sorted({r.height**2 for r in results if r.timing is not None})))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value**0.5)}²"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(color=GRID, zorder=0)
    _remove_frame(axis)
    axis.set_xlabel("pixels of the map", fontsize=9.5, color=MUTED)
    axis.set_ylabel("milliseconds a call", fontsize=9.5, color=MUTED)
    _add_titles(figure, title, subtitle)
    return figure


def plot_layers(totals: Sequence[Total], title: str, subtitle: str) -> Figure:
    """Seconds of a UNet's call over the size of the image, dashed where fitted; and the shares of its kinds of layers.

    The totals are those of :func:`gspn.bench.unet_table.totals`; the shares are shown for the first candidate, which is
    self-attention, and for GSPN.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    sizes = sorted({one.size for one in totals})
    names = list(dict.fromkeys(one.candidate for one in totals))
    colours = _colours(names)
    figure = Figure(figsize=(13.2, 5.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
    curves, *panels = figure.subplots(1, 3, width_ratios=(2.1, 1, 1))
    for name in names:
        own = [one for one in totals if one.candidate == name]
        measured = [one for one in own if not one.fitted]
        style: dict[str, Any] = {"color": colours[name], "linewidth": 2, "markersize": 4.5}
        curves.plot([one.size for one in own], [one.ms / 1e3 for one in own], "--o", markerfacecolor="white", **style)
        curves.plot([one.size for one in measured], [one.ms / 1e3 for one in measured], "-o", label=name, **style)
    curves.set_xscale("log")
    curves.set_yscale("log")
    curves.xaxis.set_major_locator(FixedLocator(sizes))
    curves.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value)}²"))
    curves.xaxis.set_minor_locator(NullLocator())
    curves.yaxis.set_minor_locator(NullLocator())
    curves.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    curves.grid(color=GRID, zorder=0)
    curves.set_title("seconds a call (dashed: fitted)", loc="left", fontsize=11, color=INK, fontweight="bold")
    curves.legend(loc="upper left", frameon=False, fontsize=10, labelcolor=INK)
    _remove_frame(curves)
    kinds = list(totals[0].by_kind)
    shades = dict(zip(kinds, (*_OTHERS, "#8fb9a8", _OURS[0]), strict=True))
    for panel, name in zip(panels, (names[0], "GSPN"), strict=True):
        own = [one for one in totals if one.candidate == name]
        below = [0.0] * len(own)
        for kind in kinds:
            share = [one.by_kind[kind] / one.ms for one in own]
            panel.bar(range(len(own)), share, 0.8, bottom=below, color=shades[kind], label=kind, zorder=2)
            below = [low + part for low, part in zip(below, share, strict=True)]
        panel.set_xticks(range(len(own)), [f"{one.size}²" for one in own], rotation=45)
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_title(f"shares, {name}", loc="left", fontsize=11, color=INK, fontweight="bold")
        _remove_frame(panel)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower right", ncols=len(kinds), frameon=False, fontsize=10, labelcolor=INK
    )
    _add_titles(figure, title, subtitle)
    return figure


def _number(cell: Cell) -> float:
    return float(cell or 0)


def _bar_panels(size: tuple[float, float], titles: Sequence[str], rows: Sequence[Any]) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, which share the rows of their bars."""
    from matplotlib.figure import Figure  # alone it needs no backend with a window, and leaves pyplot's state alone
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
    panels = list(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0])
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
        panel.set_yticks(range(len(rows)), rows)
        panel.grid(axis="x", color=GRID, zorder=0)
        _remove_frame(panel)
        panel.tick_params(axis="x", labelcolor=MUTED)
        panel.tick_params(axis="y", labelsize=11)
    panels[0].invert_yaxis()
    return figure, panels


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Blues for GSPN, others for the rest; they repeat where there are too many names."""
    ours = [name for name in names if name.lower().startswith(("gspn", "propagate"))]
    others = [name for name in names if name not in ours]
    return {name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)} | {
        name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)
    }


def _remove_frame(axis: Axes) -> None:
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=INK, labelsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def _add_titles(figure: Figure, title: str, subtitle: str) -> None:
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13.5, color=INK, fontweight="bold", linespacing=1.5)
    figure.text(0.012, 1 - 0.44 / figure.get_figheight(), subtitle, fontsize=9.5, color=MUTED, va="top")
