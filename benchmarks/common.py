"""The parts that comparisons share: runs in processes of their own, which continue if they were stopped, and tables."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Root = Annotated[Path, typer.Option(help="Directory of the runs.")]
Jobs = Annotated[int, typer.Option(min=1, help="Number of runs at a time, with one thread each.")]
Csv = Annotated[Path | None, typer.Option("--output", "-o", metavar="CSV", help="Table to write, as CSV.")]
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Step:
    """A command of ``gspn``, or of a benchmark; a file ``done`` in its directory states that it ended.

    Attributes:
        arguments: The arguments of the command.
        directory: The directory of its log and of the files that it writes.
        resumes: Whether the command has an option ``--resume``.
        script: The benchmark whose command it is; None for ``gspn``.
    """

    arguments: Sequence[str]
    directory: Path
    resumes: bool = False
    script: str | None = None

    @property
    def done(self) -> bool:
        """Whether the command ended."""
        return (self.directory / "done").exists()

    def run(self) -> None:
        """Run it unless it ended before, with one thread.

        Raises:
            CalledProcessError: it failed; ``log.txt`` says why.
        """
        if self.done:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        program = [str(Path(sys.executable).parent / "gspn")] if self.script is None else [sys.executable, self.script]
        command = [*program, *self.arguments]
        if self.resumes and (self.directory / "checkpoints").exists():
            command.append("--resume")
        with (self.directory / "log.txt").open("a") as log:
            subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        (self.directory / "done").touch()


def settings(values: Mapping[str, Any]) -> list[str]:
    """The values as ``--set`` options."""
    # JSON is YAML on one line.
    return [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def directory(root: Path, study: str, label: str, seed: int) -> Path:
    """The directory of a run of an entry."""
    name = "".join(c if c.isalnum() else "-" for c in label).strip("-").lower()
    return root / study / f"{name}-seed{seed}"


def run_all(chains: Sequence[Sequence[Step]], jobs: int) -> None:
    """Run chains of steps, ``jobs`` of them at a time, with a bar; a chain ends at the first step that fails.

    Raises:
        typer.Exit: with 1 where a step failed, after the rest.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    failed: list[Path] = []
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("runs", total=len(chains))

        def one(chain: Sequence[Step]) -> None:
            for step in chain:
                try:
                    step.run()
                except subprocess.CalledProcessError:
                    failed.append(step.directory)
                    break
            progress.advance(task)

        list(pool.map(one, chains))
    for where in failed:
        typer.echo(f"failed: see {where / 'log.txt'}", err=True)
    raise typer.Exit(bool(failed))


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows; a key that a row lacks is an empty cell. Nothing is written without a path or rows."""
    if path is None or not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]], width: int = 180) -> None:
    """Print a table whose first column names the rows."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=width).print(table)


def measure_calls(
    calls: Mapping[str, Callable[[], object]], columns: Mapping[str, Any], baselines: Mapping[str, str], repeats: int
) -> list[dict[str, Any]]:
    """Time calls in turns on the CPU, with their memory and their backend of attention.

    Args:
        calls: The calls by name.
        columns: Cells that all rows share.
        baselines: For each column the call whose time it compares with: its ratio to the row's time.
        repeats: The fewest samples of each.

    Returns:
        A row for each call; the name is in the column ``entry``.
    """
    import torch

    from gspn.bench import environment
    from gspn.bench.attention import attention_backend
    from gspn.bench.timing import Candidate, peak_memory, time_interleaved

    device = torch.device("cpu")
    here = environment.describe(device)
    candidates = [Candidate(name, call) for name, call in calls.items()]
    timings = time_interleaved(candidates, device, repeats=repeats, min_time=0.1)
    return [
        {
            "entry": name,
            **columns,
            "ms_p50": f"{timings[name].p50:.5g}",
            **{key: f"{timings[base].p50 / timings[name].p50:.4g}" for key, base in baselines.items()},
            "peak_mib": f"{(peak_memory(call, device) or 0) / 2**20:.1f}",
            "attention": attention_backend(call),
            "device": here.device,
            "threads": here.threads,
            "torch": here.torch,
        }
        for name, call in calls.items()
    ]
