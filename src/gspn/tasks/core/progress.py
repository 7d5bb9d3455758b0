"""Progress on the console: a bar, and the lines of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .metrics_table import EpochRow

_COLUMNS = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())


@contextmanager
def progress_bar(console: Console | None, description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a bar during the block, on a terminal only; the yielded function advances it by a count."""
    if console is None or not console.is_terminal:
        yield lambda _: None
        return
    with Progress(*_COLUMNS, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


class Reporter:
    """Shows a training run of ``epochs``: a bar on a terminal, and a line per epoch everywhere.

    ``quiet`` prints nothing but warnings, as every process but the first does.
    """

    def __init__(self, console: Console, epochs: int, *, quiet: bool = False) -> None:
        self.console, self.epochs, self.quiet = console, epochs, quiet
        self._progress: Progress | None = None
        self._shown = 0.0

    @contextmanager
    def running(self, updates: int, images: int, done: int) -> Iterator[None]:
        """Show the bar during the block.

        An epoch has so many ``updates``, an update so many ``images`` over all processes; ``done`` updates were made
        before.
        """
        self._updates, self._images, self._first, self._done = updates, images, done, done
        self._started = time.monotonic()
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (*_COLUMNS, TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, console=self.console, transient=True)
        with self._progress:
            self._task = self._progress.add_task("", total=updates, text="")
            yield
        self._progress = None

    def updated(self, epoch: int, update: int, loss: torch.Tensor) -> None:
        """Report that an update of an epoch (both from 0) is complete."""
        self._done = epoch * self._updates + update + 1
        now = time.monotonic()
        # Reading the loss waits for the device, so not after every update.
        if self._progress is None or (now - self._shown < 0.5 and update + 1 < self._updates):
            return
        self._shown = now
        speed = (self._done - self._first) * self._images / max(now - self._started, 1e-9)
        self._progress.update(
            self._task,
            description=f"epoch {epoch + 1}/{self.epochs}",
            completed=update + 1,
            text=f"loss {loss.item():.3f}  {speed:,.0f} images/s  {self._time_left()} left",
        )

    def doing(self, activity: str) -> None:
        """Show in the bar that something other than updates is under way."""
        if self._progress is not None:
            epoch = -(-self._done // self._updates)
            self._progress.update(self._task, description=f"epoch {epoch}/{self.epochs}, {activity}")

    def epoch(self, row: EpochRow, *, best: bool = False) -> None:
        """Print the line of an epoch."""
        parts = [f"epoch {row.epoch:>{len(str(self.epochs))}}/{self.epochs}", f"loss {row.train_loss:.4f}"]
        parts += [*row.shown_metrics(), f"lr {row.lr:.2e}", f"{row.images_per_second:,.0f} images/s"]
        if row.broken_images:
            parts.append(f"{row.broken_images} broken images")
        if row.epoch < self.epochs:
            parts.append(f"{self._time_left()} left")
        self.say("  ".join(parts) + ("  best" if best else ""))

    def warn(self, line: str) -> None:
        """Print a warning to the error stream, from any process."""
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(line)}", highlight=False, soft_wrap=True)

    def say(self, *lines: str) -> None:
        """Print lines, above the bar if there is one."""
        if not self.quiet:
            for line in lines:
                self.console.print(escape(line), highlight=False, soft_wrap=True)
            if not self.console.is_terminal:
                self.console.file.flush()  # for those who follow a log

    def _time_left(self) -> str:
        """The time for the rest of the run at the pace so far, evaluations included."""
        made = self._done - self._first
        elapsed = time.monotonic() - self._started
        return spoken_time(elapsed / made * (self.epochs * self._updates - self._done)) if made else "?"


def spoken_time(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    Example:
        >>> spoken_time(5), spoken_time(65), spoken_time(3 * 3600 + 61)
        ('0:05', '1:05', '3:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
