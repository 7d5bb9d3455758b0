"""Two files of ``gspn bench gpu-counts`` side by side, as tables for benchmarks/results/README.md.

python benchmarks/compare_gpu_counts.py benchmarks/results/gpu-counts-0.1.csv benchmarks/results/gpu-counts-0.2.csv
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

Row = dict[str, str]
Calls = dict[str, list[Row]]


def read(path: Path, arch: str) -> Calls:
    """The rows of each call on one architecture, its own row last."""
    calls: Calls = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["arch"] == arch:
                calls[row["case"]].append(row)
    return {case: sorted(rows, key=lambda row: (row["launch"] == "all", row["launch"])) for case, rows in calls.items()}


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    """The values of a column, where there are any."""
    return [float(row[column]) for row in rows if row[column]]


def most(column: str, kinds: str = "", least: bool = False) -> Callable[[list[Row]], str]:
    """The largest value over the launches whose kinds begin so, or the least one."""

    def cell(rows: list[Row]) -> str:
        some = [row for row in rows if row["launch"] != "all" and row["kernel"].startswith(kinds)]
        values = numbers(some, column)
        return f"{(min if least else max)(values):.3g}" if values else "?"

    return cell


def of_call(column: str) -> Callable[[list[Row]], str]:
    """A value of the whole call; a question mark where a launch was not compiled."""

    def cell(rows: list[Row]) -> str:
        values = numbers((row for row in rows if row["launch"] == "all"), column)
        return f"{values[0]:.3g}" if values else "?"

    return cell


FORWARD = {
    "registers": most("registers", "forward"), "stack": most("stack"),
    "programs": most("side_by_side", "forward", least=True), "instructions": most("total", "forward"),
    "barriers": most("barriers_a_line", "forward"), "launches": of_call("triton_launches"),
    "others": of_call("other_launches"), "ms": of_call("predicted_ms"),
}  # fmt: skip
BACKWARD = {
    "registers": most("registers"), "stack": most("stack"), "programs": most("side_by_side", least=True),
    "instructions, gradients": most("total", "gradients"), "barriers": most("barriers_a_line", "gradients"),
    "launches": of_call("triton_launches"), "others": of_call("other_launches"), "ms": of_call("predicted_ms"),
}  # fmt: skip
LINE_SCAN = {
    "registers": most("registers"), "stack": most("stack"), "programs": most("side_by_side", least=True),
    "instructions": most("total"), "barriers": most("barriers_a_line"), "ms": of_call("predicted_ms"),
}  # fmt: skip


def table(before: Calls, after: Calls, begins: str, ends: str, columns: dict[str, Callable[[list[Row]], str]]) -> None:
    """Print a table of the cases of the later file whose names begin and end so."""
    whole = [case for case, rows in after.items() if rows[-1]["launch"] == "all"]
    cases = [case for case in whole if case.startswith(begins) and case.endswith(ends)]
    if not cases:
        return
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for case in cases:
        cells = []
        for cell in columns.values():
            old, new = (cell(calls[case]) if case in calls else "" for calls in (before, after))
            cells.append(new if old in ("", new) else f"{old} -> {new}")
        print(f"| `{case.removeprefix(begins).removesuffix(ends)}` | " + " | ".join(cells) + " |")
    print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--arch", default="90", help="compute capability, as a number")
    options = parser.parse_args()
    calls = [read(path, options.arch) for path in (options.before, options.after)]
    table(*calls, "propagate/", "/forward", FORWARD)
    table(*calls, "propagate/", "/backward", BACKWARD)
    for mode in ("/forward", "/backward"):
        table(*calls, "line_scan/", mode, LINE_SCAN)


if __name__ == "__main__":
    main()
