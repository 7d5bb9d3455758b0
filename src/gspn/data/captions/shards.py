"""WebDataset shards with captions, opened for random access."""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL import Image

from ..base import Transform
from ..images import MAX_PIXELS, CorruptImageError, load_image
from ..splits import SPLIT_NAMES, find_split, split_folder, split_names
from .base import TEXT_COLUMN, CaptionedImages
from .parsing import MAX_RECORD, MAX_TEXT, clean, column, cut, lines_of, record_of, some

_IMAGES = ("jpg", "jpeg", "png", "webp")
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
_PACKED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_MAX_FILE = 1 << 29
_MAX_SHARDS = 100_000
# Bytes that are read after the end of a tar, which writers fill up to a multiple of 10 KiB.
_TAIL = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class CaptionedShards(CaptionedImages):
    """The samples of uncompressed tar files: an image and its caption under one name.

    The headers and all captions are read once. Images are read from the tar when they are needed, so every sample can
    be reached at any time, and a resumed run continues at its position. Files with the same name up to the first dot
    are one sample: ``0001.jpg`` with ``0001.txt`` or ``0001.json``. Files without an image are left out.

    Args:
        root: a folder of shards, one shard, or a pattern such as ``data/train-{0000..0003}.tar``; see
            ``open_captions``.
        split: the split.
        caption_column: the key in ``.json``. ``.txt`` takes precedence unless this is not ``"text"``.

    Attributes:
        shards: the tar files, in the order of the samples.

    Raises:
        ValueError: no shard is found, one is compressed or damaged, or an image has no caption or an ambiguous one.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        caption_column: str = TEXT_COLUMN,
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__("wds", transform)
        self.max_pixels = max_pixels
        self.shards = _find_shards(os.fspath(root), split)
        self._base = os.path.commonpath([shard.parent for shard in self.shards])
        # Arrays, because each worker that reads a list of numbers gets its own copy of it.
        self._shard, self._offset, self._size = array("q"), array("q"), array("q")
        self._members: list[str] = []
        without: list[str] = []
        for number in range(len(self.shards)):
            self._add(number, caption_column, without)
        if without:
            raise ValueError(
                f"{len(without):,} of {len(self):,} images have no caption: {some(without)}. Each needs a .txt of "
                f"its name, or a .json with {caption_column!r}; leave images without one out of the shards."
            )
        if not self._members:
            shards = some(str(shard) for shard in self.shards)
            raise ValueError(f"{shards}: no image ({', '.join(_IMAGES)}) in any of {len(self.shards)} shards.")

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform; a ``CorruptImageError`` if its shard has become shorter."""
        index = self._position(index)
        size, name = self._size[index], self.filename(index)
        if size > _MAX_FILE:
            raise CorruptImageError(name, f"has {size:,} bytes, more than the {_MAX_FILE:,} that an image may have")
        # Opened each time: workers share no position in a file, and the limit of open files is never reached.
        with self.shards[self._shard[index]].open("rb") as file:
            data = _read(file, self._offset[index], size)
        if len(data) < size:
            raise CorruptImageError(name, "the shard has become shorter since it was opened; open it again")
        return load_image(io.BytesIO(data), max_pixels=self.max_pixels, name=name)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The shard of image ``index``, relative to the common folder unless ``absolute``, and the name inside it."""
        index = self._position(index)
        member = self._members[index]
        shard = self.shards[self._shard[index]]
        if basename:
            return posixpath.basename(member)
        return f"{shard if absolute else Path(os.path.relpath(shard, self._base)).as_posix()}/{member}"

    def _add(self, number: int, caption_column: str, without: list[str]) -> None:
        shard = self.shards[number]
        with shard.open("rb") as file:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in _members(file, shard):
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = extension.lower()
                if not stem or extension not in (*_IMAGES, "txt", "json"):
                    continue
                if not member.isreg() or member.sparse is not None:
                    raise ValueError(f"{shard}: {cut(member.name)} is a link or sparse; write it as a regular file.")
                if extension in samples.setdefault(f"{folder}/{stem}", {}):
                    raise ValueError(f"{shard}: {cut(member.name)} is there twice; give each sample its own name.")
                samples[f"{folder}/{stem}"][extension] = member
            for parts in samples.values():
                images = [parts[extension] for extension in _IMAGES if extension in parts]
                if not images:
                    continue
                if len(images) > 1:
                    names = some(member.name for member in images)
                    raise ValueError(f"{shard}: {names} share their name up to the first dot; a sample has one image.")
                captions = _captions(file, shard, parts, caption_column)
                if not captions:
                    without.append(f"{shard.name}/{images[0].name}")
                self._shard.append(number)
                self._offset.append(images[0].offset_data)
                self._size.append(images[0].size)
                self._members.append(images[0].name)
                self.texts.append(captions)


def _captions(file: IO[bytes], shard: Path, parts: dict[str, tarfile.TarInfo], caption_column: str) -> tuple[str, ...]:
    text, record = parts.get("txt"), parts.get("json")
    if text is not None and caption_column == TEXT_COLUMN:
        where = f"{shard}: {cut(text.name)}"
        return clean(lines_of(_read(file, text.offset_data, min(text.size, MAX_TEXT + 1)), where), where)
    if record is not None:
        where = f"{shard}: {cut(record.name)}"
        parsed = record_of(_read(file, record.offset_data, min(record.size, MAX_RECORD + 1)), where)
        return clean(column(parsed, caption_column, where), where)
    return ()


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _members(file: IO[bytes], shard: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, up to the mark of its end.

    tarfile takes a damaged header for the end of the archive, and an archive that was cut between two members for a
    complete one: samples would be missing without an error.
    """
    start = file.read(8)
    file.seek(0)
    for magic, remedy in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{shard} is compressed, which allows no random access; unpack it: {remedy}")
    try:
        yield from _walk(file)
    except MemoryError:
        raise
    except Exception as error:  # tarfile raises any error when parsing fails: ValueError, KeyError, RecursionError, ...
        raise ValueError(
            f"{shard} is not a tar, or damaged or cut off ({error or type(error).__name__}); fetch or write it again."
        ) from error


def _walk(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    before = -1
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as archive:
        while (member := archive.next()) is not None:
            # Older versions of tarfile follow a negative size back without end.
            if member.offset <= before or member.size < 0:
                raise tarfile.ReadError(f"the header at byte {member.offset:,} leads back")
            before = member.offset
            yield member
        end = archive.offset
    rest = _read(file, end, _TAIL)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no mark of the end at byte {end:,}")
    if rest.count(0) < len(rest):
        raise tarfile.ReadError(f"neither a header nor the end at byte {end:,}; or two archives in one file")


def _find_shards(root: str, split: str) -> list[Path]:
    if Path(root).is_dir():
        return _shards_in(Path(root), split)
    if "{split}" in root:
        root = root.replace("{split}", split_names(split)[0])
    else:
        find_split(split, (), f"{root=}, which has no {{split}} in it")
    shards = [Path(path) for path in ([root] if Path(root).is_file() else _expand(root))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{root=}: {len(missing):,} of {len(shards):,} shards do not exist: {some(missing)}. Pass the folder of "
            "the shards, or a pattern such as 'data/train-{0000..0003}.tar'."
        )
    if len(set(shards)) < len(shards):
        raise ValueError(f"{root=} names a shard twice.")
    return shards


def _shards_in(root: Path, split: str) -> list[Path]:
    """The shards of a split: those in its folder, or those whose names begin with the split."""
    names = split_names(split)
    by_name = {
        path: prefix
        for path in sorted(root.glob("*.tar"))
        if (prefix := re.split(r"[-_.]", path.name)[0]) in SPLIT_NAMES or prefix == split
    }
    folders = [name for name in (*names, *SPLIT_NAMES) if (root / name).is_dir()]
    if by_name and not folders and split != "all":
        find_split(split, sorted(set(by_name.values())), f"the shards of root={str(root)!r}")
        shards = [path for path, prefix in by_name.items() if prefix in names]
    else:
        root = split_folder(root, split)
        shards = sorted(path for path in root.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    packed = sorted(path.name for path in root.iterdir() if path.name.lower().endswith(_PACKED_NAMES))
    if packed:
        raise ValueError(
            f"root={str(root)!r} holds compressed shards, which allow no random access: {some(packed)}. "
            "Unpack them to .tar, or move them away."
        )
    if not shards:
        raise ValueError(f"root={str(root)!r} holds no *.tar.")
    return shards


def _expand(pattern: str) -> list[str]:
    """Expand ``a-{00..02}.tar`` and ``{a,b}.tar``."""
    paths = [pattern]
    while match := _BRACES.search(paths[0]):  # the same braces are left in all
        inside = match[1]
        numbers = _RANGE.fullmatch(inside)
        if numbers:
            span, width = range(int(numbers[1]), int(numbers[2]) + 1), len(numbers[1])
        else:
            span, width = range(inside.count(",") + 1), 0
        if span.stop - span.start < (1 if numbers else 2):
            raise ValueError(f"root={pattern!r}: {match[0]} is not a pattern; write {{0..3}}, upwards, or {{a,b}}.")
        # Checked first, because a range may have more numbers than fit in the memory.
        if len(paths) * (span.stop - span.start) > _MAX_SHARDS:
            raise ValueError(f"root={pattern!r} stands for more than {_MAX_SHARDS:,} shards; name fewer.")
        parts = [f"{number:0{width}}" for number in span] if numbers else inside.split(",")
        paths = [_BRACES.sub(lambda _, part=part: part, path, count=1) for path in paths for part in parts]
    return paths
