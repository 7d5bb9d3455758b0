"""Files: written as a whole or not at all, whenever the process or the machine stops; read without trust."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ._errors import UsageError, require

if TYPE_CHECKING:
    from torch import Tensor

_OLD = ".part-old-"
_MOST_TEXT = 1 << 28  # bytes of a text file, an index of millions of images among them


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """The name of a file to write in place of ``path``: put there if the block succeeds.

    It is on the disk before it takes the place of the old one, in one step. Where ``path`` is a link, the file that it
    leads to is replaced.

    Raises:
        OSError: it cannot be written, or is a pipe, a socket or a device, which nothing may take the place of.
    """
    path = Path(os.path.realpath(path))
    _check_replaceable(path)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            sync(part)
            part.replace(path)
            sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """The name of a directory to fill in place of ``path``: put there if the block succeeds.

    Its files are on the disk before it takes the place of the old one. Directories cannot change places in one step
    everywhere: a process that stops in between leaves the old one as ``.part-old-...``, and none under the name.

    Raises:
        UsageError: the directory is the current one or the root, which nothing takes the place of.
        OSError: it cannot be written.
    """
    if path.name in ("", ".."):
        raise UsageError(f"the directory {printable(path)} is not replaced as a whole; name one inside it.")
    part, old = path.with_name(f".part-{os.getpid()}-{path.name}"), path.with_name(f"{_OLD}{path.name}")
    with naming(path):
        remove(part)
        part.mkdir(parents=True)
        try:
            yield part
            for file in (*part.rglob("*"), part):
                sync(file)
            remove(old)
            if os.path.lexists(path):
                path.rename(old)
            part.rename(path)
            sync(path.parent)
            remove(old)
        finally:
            remove(part)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it, if it is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def remove_parts(directory: Path) -> None:
    """Remove what a killed process left of files in a directory, or one below it; nobody else may write there.

    A directory that :func:`replaced_directory` had put aside returns to its name if nothing took its place.
    """
    below = [path for path in directory.glob("*/.part-*") if not path.parent.is_symlink()]  # a link may lead out
    for path in [*directory.glob(".part-*"), *below]:
        name = path.name.removeprefix(_OLD)
        if path.name != name and not path.with_name(name).exists():
            path.rename(path.with_name(name))
        elif path.name != name or re.match(r"\.part-\d+-.", path.name):
            remove(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system in the block name ``path``, also safetensors' own, unless they name another file.

    Writing to a full disk raises an error without a name, and safetensors one of a type of its own.
    """
    try:
        yield
    except Exception as error:
        foreign = (
            re.search(r"(?:os error|code:) (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        )
        code = error.errno if isinstance(error, OSError) else foreign and int(foreign[1])
        named = getattr(error, "filename", None)
        if code is None or (named is not None and ".part-" not in str(named)):
            raise
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in place of the file."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # a directory cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Find out before hours of work whether ``path`` can be written: its folder, or the first above it that exists.

    Raises:
        OSError: it cannot.
    """
    path = Path(os.path.realpath(path))
    _check_replaceable(path)
    folder = path if path.is_dir() else path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(folder))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", os.fspath(path)) from None


def _check_replaceable(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read bytes, but not a pipe, a socket or a device, which may never end or never begin.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for somebody who writes

    file = open(path, "rb", opener=opener)  # noqa: SIM115  (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    return file


def read_text(path: Path, *, most: int = _MOST_TEXT) -> str:
    """The text of a file that a person or another program wrote.

    Args:
        path: the file.
        most: the limit of bytes.

    Raises:
        UsageError: it is larger than that, or not UTF-8.
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UsageError(f"{printable(path)} has more than {most:,} bytes, too many for a file of text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{printable(path)} is not UTF-8 text: byte {error.start:,} is {data[error.start]:#04x}."
        ) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file that a person or another program wrote.

    Raises:
        UsageError: it is not JSON.
        OSError: it cannot be read, or is not a regular file.
    """
    return parse_json(read_text(path), printable(path))


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A ``.safetensors`` file that a person or another program wrote, as safetensors opens it; it stays open.

    Raises:
        UsageError: it is damaged, or in another format.
        OSError: it cannot be read, or is not a regular file.
    """
    safetensors = require("safetensors", "safetensors.torch")
    try:
        with open_regular(path) as file:
            # safetensors takes paths of UTF-8 alone.
            name = f"/proc/self/fd/{file.fileno()}" if "\\x" in printable(path) else path
            opened = safetensors.safe_open(name, framework="pt")
        yield opened
    except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        # Not only its own error: a dtype that this PyTorch does not have, for example, ends as AttributeError.
        raise UsageError(f"{printable(path)} is not a whole safetensors file: {error}.") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by :func:`open_tensors`, on the CPU."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def parse_json(text: str, what: str) -> Any:
    """JSON from a file that a person or another program wrote; ``what`` names it in the error.

    Raises:
        UsageError: it is not JSON, or nested deeper than can be read.

    Example:
        >>> parse_json('{"red": 1}', "colours.json")
        {'red': 1}
        >>> parse_json("[[1]", "colours.json")
        Traceback (most recent call last):
        gspn._errors.UsageError: colours.json is not JSON: Expecting ',' delimiter: line 1 column 5 (char 4).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UsageError(f"{what} is not JSON that can be read: it is nested too deeply.") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise UsageError(f"{what} is not JSON: {error}.") from None


def printable(name: object) -> str:
    r"""A name for messages and tables: control characters, which a terminal would obey, and bytes that are not UTF-8
    are escaped.

    Example:
        >>> printable("caf\u00e9 \x1b[31m.png"), printable(os.fsdecode(b"\xff.png"))
        ('café \\x1b[31m.png', '\\xff.png')
    """
    text = str(name)
    return text if text.isascii() and text.isprintable() else "".join(map(_escaped, text))


def short(value: object) -> str:
    """The value as errors show it: at most 60 characters.

    Example:
        >>> len(short(list(range(1000))))
        60
    """
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    kind = unicodedata.category(letter)
    if letter in "\u200c\u200d":  # joiners, of which emoji and some scripts are made
        return letter
    # Controls, directions of writing and other formats, surrogates, private and unassigned characters; separators.
    return letter.encode("unicode_escape").decode() if kind[0] == "C" or kind in ("Zl", "Zp") else letter
