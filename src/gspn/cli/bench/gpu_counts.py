"""``gspn bench gpu-counts``: what the Triton kernels execute, compiled for cards that need not be here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape

from gspn._console import Console
from gspn._errors import UsageError

from ..messages import titled_table, wrote
from ..options import output_file
from .common import count, progress_bar

_WIDTH = 170
_ARCHS = (80, 86, 90, 100, 120)
_SHOWN: Mapping[str, str] = {
    "launches": "triton_launches", "others": "other_launches", "registers": "registers", "stack": "stack",
    "programs": "side_by_side", "instructions": "total", "barriers": "barriers_a_line", "overlap": "overlap",
    "bytes ms": "bytes_ms", "predicted ms": "predicted_ms",
}  # fmt: skip


def _check_archs(values: list[int] | None) -> list[int] | None:
    for one in values or []:
        if one not in _ARCHS:
            raise typer.BadParameter(f"{one} is not one of {', '.join(map(str, _ARCHS))}.")
    return list(dict.fromkeys(values)) if values else values


def bench_gpu_counts(
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Names of cases, with * and ?, among those of --all. Repeatable."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Count every case; the default is a few dozen.")] = False,
    names: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="CC", callback=_check_archs, help="Compute capability: 80, 86, 90, 100 or 120. Default: all."
        ),
    ] = None,
    workers: Annotated[int, count("Kernels compiled at the same time.")] = 1,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Longest processor time for a kernel.")] = 20,
    output: Annotated[Path | None, output_file("--output", "-o", metavar="CSV", help="Table to write, as CSV.")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here, and count what they execute.

    A case is a call of propagate or line_scan, or its backward. Its launches are planned as on the card named in the
    table, compiled and disassembled. The table has a row for each call, with the worst of its launches; the CSV has one
    for each launch too. Rows are written as they come, and a run with the same --output continues the
    last one.

    Instructions are those of a warp in loops for 32 elements of use; barriers are those of a line, or tile. The time
    is predicted by the model that gspn.bench.gpu_model describes. Nothing is measured.
    """
    from gspn.bench import gpu_cases
    from gspn.bench.gpu_counts import count_cases

    known = gpu_cases.all_cases()
    chosen = known if every else gpu_cases.default_cases()
    if case:
        unknown = [one for one in case if not any(fnmatchcase(each.name, one) for each in known)]
        if unknown:
            raise UsageError(f"--case {unknown[0]!r} matches no case; --all --list prints their names.")
        chosen = [each for each in known if any(fnmatchcase(each.name, one) for one in case)]
    if names:
        for each in chosen:
            typer.echo(each.name)
        return
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=None)
        rows = count_cases(
            chosen, arch or _ARCHS, output, workers=workers, timeout=timeout,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    of_case = {each.name for each in chosen}
    calls = [row for row in rows if row["launch"] == "all" and row["case"] in of_case]
    for one in arch or _ARCHS:
        _print(one, [row for row in calls if str(row["arch"]) == str(one)])
    if output is not None:
        wrote(output)


def _print(arch: int, calls: Sequence[Mapping[str, Any]]) -> None:
    if not calls:
        return
    title = f"sm_{arch}, {calls[0]['card']}: the worst launch of each call; predicted, not measured"
    table = titled_table(title, ["case"], tuple(_SHOWN), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in calls:
        cells = ["" if row.get(key) is None else _short(row[key]) for key in _SHOWN.values()]
        table.add_row(escape(row["case"]), *cells)
    notes = [f"{row['case']}: {row['note']}" for row in calls if row.get("note")]
    table.caption = escape("\n".join(notes))
    Console(width=max(Console().width, _WIDTH)).print(table)


def _short(value: Any) -> str:
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return str(value)
