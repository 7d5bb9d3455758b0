"""Progress where the output is not a terminal: plain lines by the clock."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gspn.tasks.core import progress
from gspn.tasks.core.progress import Reporter, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> list[str]:
    text = console.file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    return text.splitlines()


def test_training_says_every_30_seconds_where_it_is(clock, console):
    reporter = Reporter(console, 2)
    with reporter.running(10, images=8, done=0):
        for update in range(10):
            clock.now += 20
            reporter.updated(0, update, torch.tensor(0.5))
        assert said(console) == [
            f"epoch 1/2, update {update} of 10  loss 0.500  0 images/s  {left} left"
            for update, left in ((2, "6:00"), (4, "5:20"), (6, "4:40"), (8, "4:00"), (10, "3:20"))
        ]
        clock.now += 29
        reporter.doing("evaluating")
        assert len(said(console)) == 5
        clock.now += 1
        reporter.doing("evaluating")
        assert said(console)[5:] == ["epoch 1/2, evaluating"]
        clock.now += 29
        reporter.say("a line")  # begins a new interval
        clock.now += 29
        reporter.doing("evaluating")
        assert said(console)[6:] == ["a line"]


def test_other_processes_and_terminals_say_nothing_plain(clock, console):
    terminal = Console(file=io.StringIO(), width=200, force_terminal=True)
    for reporter in (Reporter(console, 2, quiet=True), Reporter(terminal, 2)):
        reporter._plain.tick(lambda: "never")
        clock.now += 60
        reporter._plain.tick(lambda: "never")
    assert not said(console) and "never" not in terminal.file.getvalue()


def test_a_bar_is_lines(clock, console):
    with progress_bar(console, "encoding \x1b[31mred", 300) as advance:
        for _ in range(5):
            clock.now += 10
            advance(20)
    assert said(console) == ["encoding \\x1b[31mred: 60 of 300, 2:00 left"]
    with progress_bar(None, "nothing", 3) as advance:
        clock.now += 60
        advance(3)
