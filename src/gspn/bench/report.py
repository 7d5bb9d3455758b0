"""What is kept of measurements: a CSV with one row each, and a plot against the copy bandwidth."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .._figures import require_matplotlib, save_figure  # noqa: F401  (the commands save what is plotted here)
from .._files import replaced
from .environment import Environment
from .timing import Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None


@dataclass(frozen=True)
class Measurement:
    """One candidate's time and what it is compared with."""

    op: str
    impl: str
    mode: str
    direction: str
    dtype: str
    shape: Mapping[str, int | None]
    """The operator's own columns: sizes, groups, segment."""
    memory_format: str
    timing: Timing
    traffic: int
    """Bytes it has to move if each tensor passes the memory once."""
    copy: str
    """The kind of copy that was the fastest in the same run."""
    copy_gbs: float
    loop_ms: float | None
    """The p50 of the specification's loop in the same run; None if it was left out."""

    @property
    def gbs(self) -> float:
        """Gigabytes (10^9) a second that the p50 amounts to."""
        return self.traffic / self.timing.p50 / 1e6

    @property
    def fraction_of_copy(self) -> float:
        """``gbs`` over the copy bandwidth; may pass 1: a copy writes every second byte, a scan fewer."""
        return self.gbs / self.copy_gbs

    @property
    def speedup_over_loop(self) -> float | None:
        """How many times faster than the loop; None without its time."""
        return None if self.loop_ms is None else self.loop_ms / self.timing.p50

    def row(self, environment: Environment, pages: str, date: datetime) -> dict[str, Cell]:
        """The CSV's columns, in order."""
        timing = self.timing
        return {
            "op": self.op,
            "impl": self.impl,
            "mode": self.mode,
            "direction": self.direction,
            "dtype": self.dtype,
            **self.shape,
            "memory_format": self.memory_format,
            "p20_ms": _rounded(timing.quantile(0.2)),
            "p50_ms": _rounded(timing.p50),
            "p80_ms": _rounded(timing.quantile(0.8)),
            "samples": len(timing.samples_ms),
            "bytes": self.traffic,
            "gbs": _rounded(self.gbs),
            "copy": self.copy,
            "copy_gbs": _rounded(self.copy_gbs),
            "fraction_of_copy": _rounded(self.fraction_of_copy),
            "speedup_over_loop": _rounded(self.speedup_over_loop),
            "peak_memory_mb": _rounded(None if timing.peak_bytes is None else timing.peak_bytes / 1e6),
            "pages": pages,
            **asdict(environment),
            "date": date.isoformat(timespec="seconds"),
        }


def _rounded(value: float | None) -> float | None:
    """Five significant digits: more than any clock is good for, and a file that can be read."""
    return None if value is None else float(f"{value:.5g}")


def write_csv(
    path: Path, measurements: Sequence[Measurement], environment: Environment, *, pages: str = "system"
) -> None:
    """Write one row a measurement, replacing the file as a whole or not at all.

    Args:
        path: the CSV; its folder is created if need be.
        measurements: what to write, of one operator.
        environment: where it was measured.
        pages: how CPU memory was handed out: ``"kept"`` or ``"system"``, see
            :func:`~gspn.bench.timing.freed_pages_kept`.

    Raises:
        ValueError: there is nothing to write.
        OSError: the file cannot be written.
    """
    if not measurements:
        raise ValueError("there are no measurements to write.")
    date = datetime.now(UTC)
    rows = [m.row(environment, pages, date) for m in measurements]
    with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# --- The plot ---------------------------------------------------------------------------------------------------------

_INK, _MUTED, _GRID = "#1f2430", "#6b7280", "#e3e6ea"
_COLOURS = {
    "cpu": "#2563a8",
    "triton": "#2563a8",
    "reference": "#c9ced6",
    "line-per-launch": "#e0a458",
}


def plot_fractions(measurements: Sequence[Measurement], title: str, subtitle: str) -> Figure:
    """Horizontal bars of the fraction of copy bandwidth: a panel for each mode, a group for each direction.

    Args:
        measurements: of one operator, device and shape.
        title: the first line.
        subtitle: hardware, shape and dtype.

    Returns:
        The figure; save it with :func:`gspn._figures.save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import PercentFormatter

    modes = list(dict.fromkeys(m.mode for m in measurements))
    directions = list(dict.fromkeys(m.direction for m in measurements))
    impls = list(dict.fromkeys(m.impl for m in measurements))
    thick = 0.8 / len(impls)
    rows = len(directions) * len(impls)
    longest = max(1.0, *(m.fraction_of_copy for m in measurements))

    figure = Figure(
        figsize=(4.6 + 4.2 * len(modes), 1.9 + 0.26 * rows + 0.16 * len(directions)),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06),
    )
    # Figure alone needs no backend with a window, and leaves pyplot's state alone.
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # so that no grid line runs through a number
    for panel, mode in zip(panels, modes, strict=True):
        for i, impl in enumerate(impls):
            own = [m for m in measurements if m.mode == mode and m.impl == impl]
            places = [directions.index(m.direction) + (i - (len(impls) - 1) / 2) * thick for m in own]
            panel.barh(
                places,
                [m.fraction_of_copy for m in own],
                height=0.88 * thick,
                color=_COLOURS.get(impl, "#8a6fb0"),
                label=impl,
                zorder=2,
            )
            for place, m in zip(places, own, strict=True):
                label = {
                    "textcoords": "offset points",
                    "fontsize": 9,
                    "va": "center_baseline",
                    "zorder": 3,
                    "bbox": paper,
                }
                fraction = panel.annotate(
                    _percent(m.fraction_of_copy),
                    (m.fraction_of_copy, place),
                    xytext=(6, 0),
                    color=_INK,
                    fontweight="bold",
                    **label,
                )
                panel.annotate(
                    f"{plain_number(m.timing.p50)} ms",
                    (1, 0.5),
                    xycoords=fraction,
                    xytext=(6, 0),
                    color=_MUTED,
                    **label,
                )
        panel.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        panel.set_title(mode, loc="left", fontsize=11, color=_INK, fontweight="bold")
        panel.annotate(
            "copy",
            (1, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_INK,
        )
        panel.set_xlim(0, longest * 1.3)
        panel.set_xticks([t / 4 for t in range(int(longest * 4) + 1)])
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_yticks(range(len(directions)), directions, fontsize=11)
        panel.grid(axis="x", color=_GRID, zorder=0)
        panel.set_axisbelow(True)
        panel.tick_params(length=0, labelcolor=_INK)
        panel.tick_params(axis="x", labelcolor=_MUTED, labelsize=9)
        for side in panel.spines.values():
            side.set_visible(False)
    panels[0].invert_yaxis()
    speeds = ", ".join(dict.fromkeys(plain_number(m.copy_gbs) for m in measurements))
    figure.supxlabel(
        f"bytes that have to move over time, as a fraction of what a copy reaches in the same run ({speeds} GB/s)",
        fontsize=9,
        color=_MUTED,
    )
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=14, color=_INK, fontweight="bold", linespacing=1.5)
    figure.text(0.012, 1 - 0.47 / figure.get_figheight(), subtitle, fontsize=9.5, color=_MUTED, va="top")
    handles, labels = panels[0].get_legend_handles_labels()
    if len(modes) > 1:  # an implementation may have one mode alone
        for handle, label in zip(*panels[-1].get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    legend = figure.legend(
        handles,
        labels,
        loc="upper right",
        bbox_to_anchor=(0.99, 1 - 0.06 / figure.get_figheight()),
        ncols=len(labels),
        frameon=False,
        fontsize=10,
        labelcolor=_INK,
        columnspacing=1.4,
        handlelength=1.2,
    )
    legend.set_in_layout(False)  # it stands in the title's line
    return figure


def plain_number(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, trailing zeros too and never with an exponent.

    Example:
        >>> plain_number(2.8), plain_number(30511.2), plain_number(0.0264)
        ('2.80', '30,511', '0.0264')
    """
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(digits - before, 0)}f}"


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.095 else f"{fraction:.1%}"
