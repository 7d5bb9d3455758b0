"""What the comparisons share: runs in processes of their own, begun again where they were cut off, and their tables."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Step:
    """A command of ``gspn`` whose end a file ``done`` in its directory says.

    Attributes:
        arguments: Of the command.
        directory: For the log and for what the command writes.
        resumes: Whether the command has a ``--resume`` for when it was cut off.
    """

    arguments: Sequence[str]
    directory: Path
    resumes: bool = False

    @property
    def done(self) -> bool:
        """Whether it ended."""
        return (self.directory / "done").exists()

    def run(self) -> None:
        """Run it unless it ended before, with one thread.

        Raises:
            CalledProcessError: it failed; ``log.txt`` says why.
        """
        if self.done:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).parent / "gspn"), *self.arguments]
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
    """Where a run of an entry is kept."""
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


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
