"""A lock on a directory that one process at a time writes; it ends with the process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import warnings
from pathlib import Path
from typing import Self

from ._errors import UsageError
from ._files import printable, remove_parts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}

# Open files of held locks. A process that is forked closes them: else the lock would live as long as its children.
_held: set[int] = set()


def _close_in_child() -> None:
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class DirectoryLock:
    """Holds a directory during the block, which is created if need be; two processes never hold the same one.

    The lock is the operating system's, on the file ``.lock``, so that a process that is killed leaves no lock behind.
    Whoever has it also removes the parts of files that a killed process left. Where a file system has no locks, a
    warning says so.

    Args:
        directory: The directory.
        option: What names another directory, as the error says it.

    Raises:
        UsageError: another process holds it; the message names that process.
        OSError: it cannot be created or written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name, DirectoryLock(Path(name)) as lock:
        ...     lock.is_held()
        True
    """

    def __init__(self, directory: Path, option: str = "--output") -> None:
        self.directory, self.option = directory, option
        self._path, self._handle = directory / ".lock", -1

    def __enter__(self) -> Self:
        self._created = [one for one in (self.directory, *self.directory.parents) if not one.exists()]
        self._acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()
        with contextlib.suppress(OSError):  # a request that was refused leaves nothing behind
            for path in self._created:
                path.rmdir()

    def is_held(self) -> bool:
        """Whether the directory is still the one that was locked: not removed, moved away or replaced."""
        try:
            return os.path.samestat(os.fstat(self._handle), self._path.stat())
        except OSError:
            return False

    def renew(self) -> None:
        """Create and lock the directory again after it was removed."""
        self._release()
        self._acquire()

    def _acquire(self) -> None:
        while not self.is_held():  # the process that held it before may have removed the file in between
            self._release()
            self.directory.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            self._handle = os.open(self._path, flags, 0o644)
            _held.add(self._handle)
            try:
                _lock(self._handle)
            except OSError as error:
                if error.errno in _TAKEN:
                    holder = printable(os.read(self._handle, 200).decode(errors="replace"))
                    self._close()
                    raise UsageError(
                        f"{printable(self.directory)!r} is being written by {holder or 'another process'}; wait until "
                        f"it has ended, or name another directory with {self.option}."
                    ) from None
                warnings.warn(
                    f"{printable(self.directory)!r} cannot be locked ({error.strerror}); start no other process that "
                    "writes there.",
                    stacklevel=4,
                )
        with contextlib.suppress(OSError):  # a full disk: only the error of others says less
            os.ftruncate(self._handle, 0)
            os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        remove_parts(self.directory)

    def _release(self) -> None:
        if self.is_held():
            with contextlib.suppress(OSError):  # Windows removes no open file
                self._path.unlink()
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            _held.discard(self._handle)
            os.close(self._handle)
        self._handle = -1


def _lock(handle: int) -> None:
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the text, which others may read
    msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    os.lseek(handle, 0, os.SEEK_SET)
