"""The files of a folder: one walk, one order of names, and one count of what is left out."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator

from .._files import printable
from .images import EXTENSIONS

_SHOWN = 3

HIDDEN = ("hidden file or folder", "hidden files and folders")
NOT_IMAGES = ("file that is not an image", "files that are not images")
LOOSE = ("image beside the class folders", "images beside the class folders")
OUTSIDE = ("link that leaves the folder", "links that leave the folder")
NOWHERE = ("link that leads nowhere", "links that lead nowhere")
IN_A_CIRCLE = ("link to a folder that holds it", "links to folders that hold them")
NESTED = ("link to a folder inside a linked folder", "links to folders inside linked folders")
SPECIAL = ("pipe, socket or device", "pipes, sockets and devices")
EMPTY = ("empty folder", "empty folders")
UNREADABLE = ("folder that cannot be read", "folders that cannot be read")


class LeftOutWarning(UserWarning):
    """Files were left out of a data set."""


class LeftOut:
    """The files that are left out of a set: how many of each kind, and the names of a few. Its text is one line.

    Example:
        >>> left_out = LeftOut()
        >>> left_out.add(NOT_IMAGES, "a.txt")
        >>> left_out.add(NOT_IMAGES, "b.txt")
        >>> left_out.count, str(left_out)
        (2, 'left out: 2 files that are not images (a.txt, b.txt)')
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], tuple[int, list[str]]] = {}

    def add(self, kind: tuple[str, str], *names: str) -> None:
        """Count some names of one kind, which is a noun in singular and plural."""
        for name in names:
            count, shown = self._kinds.get(kind, (0, []))
            self._kinds[kind] = count + 1, shown if len(shown) == _SHOWN else [*shown, name]

    @property
    def count(self) -> int:
        """The number of all names."""
        return sum(count for count, _ in self._kinds.values())

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __str__(self) -> str:
        parts = []
        for (one, many), (count, shown) in sorted(self._kinds.items()):
            names = ", ".join(map(printable, shown)) + (", ..." if count > len(shown) else "")
            parts.append(f"{count:,} {one if count == 1 else many} ({names})")
        return f"left out: {', '.join(parts)}" if parts else "nothing is left out"


def natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them, without case; those that are equal so far, by their characters.

    The order is total, so it is the same in every process. Where timm's order decides, it is the same as timm's.

    Example:
        >>> natural_order({"10", "2", "cat", "Cat", "01", "1"})
        ['01', '1', '2', '10', 'Cat', 'cat']
    """
    return sorted(names, key=natural_key)


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """The key of :func:`natural_order`."""
    # Every second part is a number, so text is never compared with one.
    return [_number(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))], name


def _number(digits: str) -> tuple[int, str]:
    """The key of a number of any length, in any script's digits; Python refuses to convert one of thousands."""
    digits = "".join(str(int(digit)) for digit in digits).lstrip("0")
    return len(digits), digits


def is_image(name: str) -> bool:
    """Whether the name has the extension of an image, in upper or lower case."""
    return posixpath.splitext(name)[1].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a name, without its folder, is one that systems and editors write for themselves."""
    return name.startswith(".") or name == "__MACOSX"


def image_files(root: str | os.PathLike[str]) -> tuple[list[str], LeftOut]:
    """The images below a folder by :func:`walk`, and what was left out; files that are not images are counted too.

    Raises:
        OSError: the folder cannot be read.
    """
    left_out, images, others = LeftOut(), [], []
    for path in walk(root, left_out):
        (images if is_image(path) else others).append(path)
    left_out.add(NOT_IMAGES, *others)
    return images, left_out


def walk(root: str | os.PathLike[str], left_out: LeftOut) -> list[str]:
    """The regular files below a folder, as relative paths with slashes, sorted.

    Hidden names are left out. A link is followed if it stays inside the folder; a link to a folder also has to lead
    neither to one that holds it nor on from another linked folder, so every walk ends. The folder itself may be a
    link. Pipes, sockets and devices are left out. Names may be of any bytes.

    Args:
        root: the folder.
        left_out: what is left out is added to it.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted(_walk(os.fspath(root), left_out))


def _walk(root: str, left_out: LeftOut) -> Iterator[str]:
    real_root = os.path.realpath(root)
    folders = [("", real_root, False)]
    while folders:
        folder, real, linked = folders.pop()
        try:
            with os.scandir(real) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            if not folder:
                raise
            left_out.add(UNREADABLE, folder)
            continue
        if folder and not entries:
            left_out.add(EMPTY, folder)
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                left_out.add(HIDDEN, path)
                continue
            target = entry.path
            if entry.is_symlink():
                target = os.path.realpath(target)
                if not _holds(real_root, target):
                    left_out.add(OUTSIDE, path)
                    continue
            try:
                mode = _mode(entry, target)
            except OSError:
                left_out.add(NOWHERE, path)
                continue
            if stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                left_out.add(SPECIAL, path)
            elif not entry.is_symlink():
                folders.append((path, target, linked))
            elif _holds(target, real):
                left_out.add(IN_A_CIRCLE, path)
            elif linked:
                left_out.add(NESTED, path)
            else:
                folders.append((path, target, True))


def _mode(entry: os.DirEntry[str], target: str) -> int:
    """The kind of a file; without a call of the system for most."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return os.stat(target).st_mode  # noqa: PTH116  (names of any bytes, a million times)


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
