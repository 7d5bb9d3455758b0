"""A run that is killed and resumed ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from gspn.tasks.classify import train
from gspn.tasks.core.errors import UsageError
from tasks.classify.processes import start
from tasks.classify.runs import RANDOM, assert_same, newest_state, rows, tiny

SETTINGS = [*RANDOM, "optim.accumulate=2", "data.batch_size=32", "run.checkpoint_every_s=0"]


def test_killed_twice_and_resumed_is_the_same_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny(whole, *SETTINGS))

    # Killed from outside, at a moment that nobody chose.
    process = start(killed, SETTINGS)
    wanted = random.Random().randint(1, 15)
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if any(int(path.name[5:]) >= wanted for path in (killed / "checkpoints").glob("step-*")):
            time.sleep(random.Random().uniform(0, 0.2))
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    # Killed while it writes a checkpoint.
    process = start(killed, SETTINGS, die_in_checkpoint=3)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    half = list((killed / "checkpoints").glob(".part-step-*"))
    assert half

    train(tiny(killed, *SETTINGS), resume=True)
    assert_same(newest_state(killed), newest_state(whole))
    assert rows(killed) == rows(whole)
    for name in ("best", "last"):
        path = Path(name, "model.safetensors")
        assert (killed / path).read_bytes() == (whole / path).read_bytes()
    assert len(list((killed / "checkpoints").glob("step-*"))) == 2
    assert not list((killed / "checkpoints").glob(".part-*"))


def test_loads_no_image_twice_and_none_before_the_place_it_resumes_at(tmp_path, monkeypatch):
    from gspn.data import Seeded

    seen: list[int] = []
    plain = Seeded.__getitem__

    def getitem(self, index):
        if len(seen) == 5 * 64:
            raise KeyboardInterrupt
        seen.append(index)
        return plain(self, index)

    config = tiny(tmp_path, "schedule.epochs=1", "run.checkpoint_every_s=0")
    monkeypatch.setattr(Seeded, "__getitem__", getitem)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    first = list(seen)
    seen.clear()
    monkeypatch.setattr(Seeded, "__getitem__", lambda self, index: seen.append(index) or plain(self, index))
    train(config, resume=True)
    assert len(first) == 5 * 64
    assert len(seen) == (22 - 5) * 64
    assert len(set(first) | set(seen)) == 22 * 64


def test_a_finished_run_resumes_to_nothing(tmp_path):
    config = tiny(tmp_path, "schedule.epochs=1")
    first = train(config)
    before = (tmp_path / "metrics.csv").read_bytes(), (tmp_path / "best" / "model.safetensors").stat().st_mtime_ns
    again = train(config, resume=True)
    assert (again.best_top1, again.best_epoch, again.last) == (first.best_top1, first.best_epoch, first.last)
    assert before == (
        (tmp_path / "metrics.csv").read_bytes(),
        (tmp_path / "best" / "model.safetensors").stat().st_mtime_ns,
    )


def test_refuses_another_run_in_the_same_place(tmp_path):
    train(tiny(tmp_path, "schedule.epochs=1"))
    with pytest.raises(UsageError, match="--resume"):
        train(tiny(tmp_path, "schedule.epochs=1"))
    with pytest.raises(UsageError, match=r"optim\.lr is 0\.001.*has 0\.004"):
        train(tiny(tmp_path, "schedule.epochs=1", "optim.lr=1e-3"), resume=True)
    with pytest.raises(UsageError, match=r"resolved\.images_per_update is 32.*has 64"):
        train(tiny(tmp_path, "schedule.epochs=1", "data.batch_size=32"), resume=True)
