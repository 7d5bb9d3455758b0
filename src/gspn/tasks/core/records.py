"""What a run reports: a table of epochs that survives a kill, and what is shown meanwhile."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..._files import write_text


@dataclass(frozen=True)
class EpochRow:
    """What every task's row of ``metrics.csv`` begins with."""

    epoch: int
    """Epochs completed."""
    step: int
    """Updates completed."""
    lr: float
    """Of the epoch's last update, where it is not reduced for a layer."""
    train_loss: float
    """Mean over the epoch's images, as augmented and mixed."""
    seconds: float
    """Spent on the epoch's updates, without evaluation and checkpoints."""
    images_per_second: float
    peak_memory_mib: float
    """The most that was allocated on the CUDA device, or the most that the process has occupied."""
    broken_images: int
    """Images of the epoch that could not be read; others took their place."""


Row = TypeVar("Row", bound=EpochRow)


class MetricsTable(Generic[Row]):
    """``metrics.csv``: a row an epoch, replaced as a whole, so that a kill leaves the old table or the new one.

    Args:
        path: Of the file.
        row: The type of its rows; a figure that an epoch has not is None, and an empty cell.
    """

    def __init__(self, path: Path, row: type[Row]) -> None:
        self.path = path
        self.row = row
        self._rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = list(csv.DictReader(file))

    def last(self) -> Row | None:
        """The last row, or None."""
        if not self._rows:
            return None
        values = {}
        for field in fields(self.row):
            text = self._rows[-1][field.name]
            values[field.name] = None if text == "" else (int if field.type == "int" else float)(text)
        return self.row(**values)

    def forget_after(self, step: int) -> None:
        """Drop the rows of updates beyond ``step``, which a resumed run computes again."""
        kept = [row for row in self._rows if int(row["step"]) <= step]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._write()

    def append(self, row: Row) -> None:
        """Add a row; None is an empty cell."""
        self._rows.append({name: "" if value is None else _written(value) for name, value in asdict(row).items()})
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(self.row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())


class Reporter:
    """Shows a run: a bar on a terminal, a line an epoch anywhere else; nothing where ``quiet``.

    Args:
        console: Where to.
        epochs: Of the run.
        updates: Of an epoch.
        images: Of an update, over all processes.
        done: Updates of the run that were made before.
        quiet: Show nothing: every process but the first.
    """

    def __init__(
        self, console: Console, *, epochs: int, updates: int, images: int, done: int = 0, quiet: bool = False
    ) -> None:
        self.console = console
        self.epochs = epochs
        self.updates = updates
        self.images = images
        self.quiet = quiet
        self._started = time.monotonic()
        self._first = done
        self._done = done
        self._shown = 0.0
        self._progress: Progress | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The bar is shown within this block."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )
        with self._progress:
            self._task = self._progress.add_task("", total=self.updates, text="")
            yield
        self._progress = None

    def updated(self, epoch: int, update: int, loss: torch.Tensor, doing: str = "epoch") -> None:
        """An update of an epoch (both from 0) is complete."""
        self._done = epoch * self.updates + update + 1
        now = time.monotonic()
        # Reading the loss waits for the device, so not after every update.
        if self._progress is None or (now - self._shown < 0.5 and update + 1 < self.updates):
            return
        self._shown = now
        made = self._done - self._first
        speed = made * self.images / max(now - self._started, 1e-9)
        self._progress.update(
            self._task,
            description=f"{doing} {epoch + 1}/{self.epochs}",
            completed=update + 1,
            text=f"loss {loss.item():.3f}  {speed:,.0f} images/s  {self.left()} left",
        )

    def left(self) -> str:
        """The time that the rest of the run takes at the pace so far, evaluations included."""
        made = self._done - self._first
        elapsed = time.monotonic() - self._started
        return spoken_time(elapsed / made * (self.epochs * self.updates - self._done)) if made else "?"

    def doing(self, what: str, epoch: int) -> None:
        """The bar says that something else than updates is under way."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"epoch {epoch + 1}/{self.epochs}, {what}")

    def epoch(self, row: EpochRow, found: Sequence[str] = (), best: bool = False) -> None:
        """A line about an epoch; ``found`` is what its evaluation says."""
        parts = [f"epoch {row.epoch:>{len(str(self.epochs))}}/{self.epochs}", f"loss {row.train_loss:.4f}", *found]
        parts += [f"lr {row.lr:.2e}", f"{row.images_per_second:,.0f} images/s"]
        if row.broken_images:
            parts.append(f"{row.broken_images} broken images")
        if row.epoch < self.epochs:
            parts.append(f"{self.left()} left")
        self.say("  ".join(parts) + ("  best" if best else ""))

    def warn(self, line: str) -> None:
        """A line to the error stream, from whichever process."""
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(line)}", highlight=False, soft_wrap=True)

    def say(self, *lines: str) -> None:
        """Lines, above the bar if there is one."""
        if not self.quiet:
            for line in lines:
                self.console.print(escape(line), highlight=False, soft_wrap=True)
            if not self.console.is_terminal:
                self.console.file.flush()  # whoever follows a log wants the line now


def spoken_time(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    Example:
        >>> spoken_time(5), spoken_time(65), spoken_time(3 * 3600 + 61)
        ('0:05', '1:05', '3:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that was allocated on a CUDA device, or that this process has occupied, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def spoken_list(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are.

    Example:
        >>> spoken_list(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _written(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
