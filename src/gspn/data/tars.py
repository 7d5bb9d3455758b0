"""Uncompressed tar files, whose members are read at any place and never unpacked."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image

from .._errors import UsageError
from .._files import open_regular
from .images import CorruptImageError, load_image

_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
_MAX_FILE = 1 << 29
_MAX_HEADER = 1 << 20  # bytes: of a long name, or of attributes
# Bytes that are read after the end of a tar, which writers fill up to a multiple of 10 KiB.
_TAIL = 1 << 20


def read_member(tar: Path, offset: int, size: int, name: str, max_pixels: int) -> Image.Image:
    """The image at a place in a tar, RGB; ``name`` names it in errors.

    Raises:
        CorruptImageError: it cannot be decoded, or the tar has become shorter.
        OSError: the tar cannot be read.
    """
    if size > _MAX_FILE:
        raise CorruptImageError(name, f"has {size:,} bytes, more than the {_MAX_FILE:,} that an image may have")
    # Opened each time: workers share no position in a file, and the limit of open files is never reached.
    with open_regular(tar) as file:
        data = read_at(file, offset, size)
    if len(data) < size:
        raise CorruptImageError(name, "the tar has become shorter since it was opened; open it again")
    return load_image(io.BytesIO(data), max_pixels=max_pixels, name=name)


def read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    """The bytes at a place; fewer at the end of the file."""
    file.seek(offset)
    return file.read(size)


def members(file: IO[bytes], shard: Path) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar, up to the mark of its end; ``shard`` names it in errors.

    tarfile takes a damaged header for the end of the archive, and an archive that was cut between two members for a
    complete one: samples would be missing without an error.

    Raises:
        UsageError: it is compressed, damaged or cut off.
    """
    start = file.read(8)
    file.seek(0)
    for magic, remedy in _COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(f"{shard} is compressed, which allows no random access; unpack it: {remedy}")
    try:
        yield from _walk(file)
    except MemoryError:
        raise
    except Exception as error:  # tarfile raises any error when parsing fails: ValueError, KeyError, RecursionError, ...
        raise UsageError(
            f"{shard} is not a tar, or damaged or cut off ({error or type(error).__name__}); fetch or write it again."
        ) from error


class _Headers:
    """An open tar, of which tarfile reads headers alone: not as many bytes as one claims to have."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.name, self.seek, self.tell = file, "tar", file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _walk(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    before = -1
    headers: Any = _Headers(file)
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="backslashreplace") as archive:
        while (member := archive.next()) is not None:
            # Older versions of tarfile follow a negative size back without end.
            if member.offset <= before or member.size < 0:
                raise tarfile.ReadError(f"the header at byte {member.offset:,} leads back")
            before = member.offset
            yield member
        end = archive.offset
    rest = read_at(file, end, _TAIL)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no mark of the end at byte {end:,}")
    if rest.count(0) < len(rest):
        raise tarfile.ReadError(f"neither a header nor the end at byte {end:,}; or two archives in one file")
