"""Progress on the console: a bar on a terminal, else a plain line every 30 seconds; and the lines of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..._files import printable
from .metrics_table import EpochRow

_COLUMNS = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())

PLAIN_EVERY_S = 30.0
"""Seconds between lines where the output is not a terminal."""


class PlainProgress:
    """Lines in place of a bar, for a log: one when 30 seconds have passed since the last, without escape codes."""

    def __init__(self, console: Console | None) -> None:
        self.console = None if console is None or console.is_terminal else console
        self._shown = time.monotonic()

    def tick(self, line: Callable[[], str]) -> None:
        """Print what ``line`` returns, if it is time to."""
        if self.console is not None and time.monotonic() - self._shown >= PLAIN_EVERY_S:
            self.say(line())

    def say(self, line: str) -> None:
        """Print a line now."""
        self._shown = time.monotonic()
        if self.console is not None:
            self.console.print(escape(printable(line)), highlight=False, soft_wrap=True)
            self.console.file.flush()  # for those who follow a log


@contextmanager
def progress_bar(console: Console | None, description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a bar during the block, or lines where there is no terminal; the yielded function advances by a count."""
    plain, done = PlainProgress(console), 0
    start = time.monotonic()
    if console is None or not console.is_terminal:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            plain.tick(lambda: f"{description}: {counted(done, total, time.monotonic() - start)}")

        yield advance
        return
    with Progress(*_COLUMNS, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(escape(printable(description)), total=total)
        yield lambda count: progress.advance(task, count)


def counted(done: int, total: int, seconds: float) -> str:
    """How much is done, and how long the rest takes at that pace.

    Example:
        >>> counted(50, 200, 30.0)
        '50 of 200, 1:30 left'
    """
    left = spoken_time(seconds / done * max(total - done, 0)) if done else "?"
    return f"{done:,} of {total:,}, {left} left"


class Reporter:
    """Shows a training run of ``epochs``: a bar, or a line every 30 seconds, and a line per epoch everywhere.

    ``quiet`` prints nothing but warnings, as every process but the first does.
    """

    def __init__(self, console: Console, epochs: int, *, quiet: bool = False) -> None:
        self.console, self.epochs, self.quiet = console, epochs, quiet
        self._progress: Progress | None = None
        self._shown = 0.0
        self._plain = PlainProgress(None if quiet else console)
        self._updates, self._done = 1, 0

    @contextmanager
    def running(self, updates: int, images: float, done: int) -> Iterator[None]:
        """Show the bar during the block.

        An epoch has so many ``updates``, an update so many ``images`` over all processes, on average; ``done`` updates
        were made before.
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
        where = f"epoch {epoch + 1}/{self.epochs}"

        def text() -> str:
            # Reading the loss waits for the device, so not after every update.
            speed = (self._done - self._first) * self._images / max(now - self._started, 1e-9)
            return f"loss {loss.item():.3f}  {speed:,.0f} images/s  {self._time_left()} left"

        self._plain.tick(lambda: f"{where}, update {update + 1:,} of {self._updates:,}  {text()}")
        if self._progress is not None and (now - self._shown >= 0.5 or update + 1 == self._updates):
            self._shown = now
            self._progress.update(self._task, description=where, completed=update + 1, text=text())

    def doing(self, activity: str) -> None:
        """Show that something other than updates is under way; to be called again while it is."""
        epoch = -(-self._done // self._updates)
        line = f"epoch {epoch}/{self.epochs}, {activity}"
        self._plain.tick(lambda: line)
        if self._progress is not None:
            self._progress.update(self._task, description=line)

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
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(printable(line))}", highlight=False, soft_wrap=True)

    def say(self, *lines: str) -> None:
        """Print lines, above the bar if there is one."""
        for line in lines:
            if self._plain.console is not None:
                self._plain.say(line)
            elif not self.quiet:
                self.console.print(escape(printable(line)), highlight=False, soft_wrap=True)

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
