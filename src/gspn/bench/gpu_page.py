"""One page of what ``scripts/gpu_check.py`` found: a summary, plots where matplotlib is installed, and every row."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gspn._errors import MissingExtraError, require
from gspn._files import read_json, write_text

from .gpu_check import ERROR, FAIL, MEMORY, OK, SKIPPED, Row, read_rows
from .report import GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2430; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 12px; margin: .6em 0 1.6em; display: block; overflow-x: auto }
th, td { padding: 2px 8px; text-align: left; white-space: nowrap; border-bottom: 1px solid #e3e6ea }
td.note, td.plan { white-space: normal; min-width: 16em }
tr.wrong td { background: #fbd5d5 } tr.skipped td { color: #8a8f98 }
img { max-width: 100% } code { font-size: 12px } summary { font-weight: 600; font-size: 16px; margin: .8em 0 }
"""
_ALWAYS = ("case", "what", "status", "note")
_BAD = (FAIL, ERROR, MEMORY)


def write_page(folder: Path) -> Path:
    """Write ``index.html`` about all parts whose CSV files are in a folder.

    Returns:
        The page, which needs no other file.
    """
    rows = [row for path in sorted(folder.glob("part*.csv")) for row in read_rows(path)]
    counts = Counter(row["status"] for row in rows)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>gspn on a GPU</title>",
        f"<style>{_STYLE}</style><h1>gspn on a GPU</h1>",
        _environment(folder),
        "<p><b>" + ", ".join(f"{counts[name]} {name}" for name in (OK, FAIL, ERROR, MEMORY, SKIPPED)) + "</b></p>",
        _table([row for row in rows if row["status"] in _BAD], "Rows that are wrong or failed", opened=True),
        *_plots(rows),
    ]
    steps = dict.fromkeys(row["step"] for row in rows)
    parts += [_table([row for row in rows if row["step"] == step], step) for step in steps]
    path = folder / "index.html"
    write_text(path, "\n".join(parts) + "\n")
    return path


def _environment(folder: Path) -> str:
    path = folder / "environment.json"
    if not path.exists():
        return "<p>No worker has told its environment.</p>"
    known = read_json(path)
    return "<p>" + " · ".join(f"{name}: {html.escape(str(value))}" for name, value in known.items()) + "</p>"


def _table(rows: Sequence[Row], title: str, opened: bool = False) -> str:
    """The rows of a step, with the columns that one of them has."""
    if not rows:
        return ""
    of_environment = set(list(rows[0])[list(rows[0]).index("seconds") + 1 :])
    columns = [
        name for name in rows[0]
        if name not in of_environment | {"step"} and (name in _ALWAYS or any(row[name] for row in rows))
    ]  # fmt: skip
    lines = [
        f"<details{' open' if opened else ''}><summary>{html.escape(title)}: {len(rows)} rows</summary><table><tr>"
    ]
    lines += [f"<th>{name}</th>" for name in columns]
    for row in rows:
        kind = "wrong" if row["status"] in _BAD else "skipped" if row["status"] == SKIPPED else ""
        cells = (f'<td class="{name}">{html.escape(str(row[name]))}</td>' for name in columns)
        lines.append(f'</tr>\n<tr class="{kind}">' + "".join(cells))
    return "".join(lines) + "</tr></table></details>"


def _plots(rows: Sequence[Row]) -> list[str]:
    timed = [row for row in rows if row["status"] == OK and row["ms"]]
    try:
        require("matplotlib", extra="plot")
    except MissingExtraError as error:
        return [f"<p>No plots: {html.escape(str(error))}</p>"]
    drawings: list[tuple[str, Callable[[Sequence[Row]], Figure], list[Row]]] = [
        ("Launches beside their floors", _floors, [row for row in timed if row["what"] == "all launches"]),
        ("The operator beside others", _ratios, [row for row in timed if row["step"].startswith("9")]),
        ("Other plans over the planned one", _ratios, [row for row in timed if row["step"].startswith("7")]),
    ]
    images = []
    for title, draw, some in drawings:
        if some:
            data = io.BytesIO()
            draw(some).savefig(data, format="png", dpi=110, facecolor="white")
            source = base64.b64encode(data.getvalue()).decode()
            images.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{source}">')
    return images


def _bars(names: Sequence[str], values: Sequence[float], label: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1 + 0.24 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(names)), values, height=0.7, color="#9cc3e6", zorder=2)
    axis.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", color=GRID, zorder=0)
    axis.set_xlabel(label, fontsize=9, color=MUTED)
    axis.tick_params(length=0, labelcolor=INK, labelsize=8)
    for side in axis.spines.values():
        side.set_visible(False)
    return figure


def _floors(rows: Sequence[Row]) -> Figure:
    """The time of all launches of each case as a bar, and marks where the floors are."""
    figure = _bars([f"{row['case']}" for row in rows], [float(row["ms"]) for row in rows], "ms, logarithmic")
    (axis,) = figure.axes
    axis.set_xscale("log")
    for column, colour, name in (
        ("bytes_ms", "#e0a458", "copy"),
        ("fma_ms", "#123f73", "FMA"),
        ("mufu_ms", "#b5651d", "MUFU"),
    ):
        points = [(float(row[column]), i) for i, row in enumerate(rows) if row[column]]
        if points:
            axis.plot(
                *zip(*points, strict=True), "|", color=colour, markersize=9, markeredgewidth=2.5, label=name, zorder=3
            )
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _ratios(rows: Sequence[Row]) -> Figure:
    figure = _bars(
        [f"{row['case']}, {row['what']}" for row in rows if row["ratio"]],
        [float(row["ratio"]) for row in rows if row["ratio"]], "time over that of the first of its kind",
    )  # fmt: skip
    if max(float(row["ratio"] or 1) for row in rows) > 8:
        figure.axes[0].set_xscale("log")
    figure.axes[0].axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    return figure
