"""A lock on a directory: one process at a time, and none is left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
import warnings

import pytest

from gspn import _locks
from gspn._errors import UsageError
from gspn._locks import DirectoryLock

_FORK = multiprocessing.get_context("fork")


def hold(directory, children: int) -> None:
    """Hold the directory until killed, and have children that were forked meanwhile."""
    with DirectoryLock(directory):
        for _ in range(children):
            _FORK.Process(target=time.sleep, args=(20,), daemon=True).start()
        (directory / "held").touch()
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("children", [0, 2])
def test_another_process_is_refused_and_a_kill_leaves_no_lock(tmp_path, children):
    directory = tmp_path / "run"
    process = _FORK.Process(target=hold, args=(directory, children))
    process.start()
    deadline = time.monotonic() + 60
    while not (directory / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UsageError) as refused, DirectoryLock(directory, "--into"):
        pass
    message = str(refused.value)
    assert f"process {process.pid} on " in message and "--into" in message and "\n" not in message
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (directory / ".lock").exists()
    with DirectoryLock(directory) as lock:  # at once, though its children live on
        assert lock.is_held()
    assert [path.name for path in directory.iterdir()] == ["held"]


def test_the_same_process_is_refused_too(tmp_path):
    with DirectoryLock(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()} "), DirectoryLock(tmp_path):
        pass
    with DirectoryLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_is_created_for_a_refused_request_is_removed(tmp_path):
    with pytest.raises(UsageError, match="no"), DirectoryLock(tmp_path / "a" / "b"):
        raise UsageError("no")
    assert not list(tmp_path.iterdir())


def test_a_removed_directory_is_seen_and_locked_again(tmp_path):
    directory = tmp_path / "run"
    with DirectoryLock(directory) as lock:
        shutil.rmtree(directory)
        assert not lock.is_held()
        with DirectoryLock(directory):  # of another run, which took the name
            assert not lock.is_held()
            with pytest.raises(UsageError, match="is being written"):
                lock.renew()
        lock.renew()
        assert lock.is_held() and (directory / ".lock").exists()


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def lock(handle):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_locks, "_lock", lock)
    with pytest.warns(UserWarning, match="cannot be locked.*No locks available"), DirectoryLock(tmp_path) as held:
        assert held.is_held()


def test_no_link_is_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"\.lock"), DirectoryLock(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_parts_of_a_killed_process_are_removed(tmp_path):
    for name in (".part-12-metrics.csv", "last/.part-12-model.safetensors", ".part-old-best/a", ".part-old-last/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".part-mine").touch()
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir()
    (outside / ".part-12-not-ours").touch()
    (tmp_path / "linked").symlink_to(outside)
    with warnings.catch_warnings(), DirectoryLock(tmp_path):
        # The old best had been put aside, and nothing had taken its place.
        names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        assert names == [".lock", ".part-mine", "best", "best/a", "last", "linked"]
    assert (outside / ".part-12-not-ours").exists()
