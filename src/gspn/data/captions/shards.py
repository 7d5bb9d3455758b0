"""WebDataset shards with captions, opened for random access."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from array import array
from pathlib import Path
from typing import IO

from PIL import Image

from ..._files import open_regular
from ..base import Transform
from ..files import HIDDEN, LeftOut, is_hidden, is_image
from ..images import EXTENSIONS, MAX_PIXELS
from ..splits import SPLIT_NAMES, find_split, split_folder, split_names
from ..tars import members, read_at, read_member
from .base import TEXT_COLUMN, CaptionedImages
from .parsing import MAX_RECORD, MAX_TEXT, clean, column, cut, lines_of, record_of, some

_IMAGES = frozenset(extension.removeprefix(".") for extension in EXTENSIONS)
_TWO_DOTS = (
    "image whose name has a second dot, which makes it another field of its sample",
    "images whose names have a second dot, which makes them other fields of their samples",
)
_NO_IMAGE = ("file without an image of its name", "files without an image of their names")
_PACKED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class CaptionedShards(CaptionedImages):
    """The samples of uncompressed tar files: an image and its caption under one name.

    The headers and all captions are read once. Images are read from the tar when they are needed, so every sample can
    be reached at any time, and a resumed run continues at its position. Files with the same name up to the first dot
    are one sample: ``0001.jpg`` with ``0001.txt`` or ``0001.json``. This is WebDataset's rule, by which ``a.v1.jpg`` is
    the field ``v1.jpg`` of sample ``a`` and not its image. Such files, hidden ones and files without an image are left
    out.

    Args:
        root: a folder of shards, one shard, or a pattern such as ``data/train-{0000..0003}.tar``; see
            ``open_captions``.
        split: the split.
        caption_column: the key in ``.json``. ``.txt`` takes precedence unless this is not ``"text"``.

    Attributes:
        shards: the tar files, in the order of the samples.
        left_out: what is left out.

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
        self.left_out, self.max_pixels = LeftOut(), max_pixels
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
            raise ValueError(
                f"{shards}: no image ({', '.join(sorted(_IMAGES))}) in any of {len(self.shards)} shards; "
                f"{self.left_out}."
            )

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform; a ``CorruptImageError`` if its shard is shorter now."""
        index = self._position(index)
        tar, name = self.shards[self._shard[index]], self.filename(index)
        return read_member(tar, self._offset[index], self._size[index], name, self.max_pixels)

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
        with open_regular(shard) as file:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in members(file, shard):
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = extension.lower()
                if member.isdir():
                    continue
                if any(map(is_hidden, member.name.lstrip("./").split("/"))) or not stem:
                    self.left_out.add(HIDDEN, f"{shard.name}/{member.name}")
                elif extension not in _IMAGES and extension not in ("txt", "json"):
                    kind = _TWO_DOTS if is_image(base) else _NO_IMAGE
                    self.left_out.add(kind, f"{shard.name}/{member.name}")
                elif not member.isreg() or member.sparse is not None:
                    raise ValueError(f"{shard}: {cut(member.name)} is a link or sparse; write it as a regular file.")
                elif extension in samples.setdefault(f"{folder}/{stem}", {}):
                    raise ValueError(f"{shard}: {cut(member.name)} is there twice; give each sample its own name.")
                else:
                    samples[f"{folder}/{stem}"][extension] = member
            for parts in samples.values():
                images = [member for extension, member in parts.items() if extension in _IMAGES]
                if not images:
                    self.left_out.add(_NO_IMAGE, *(f"{shard.name}/{member.name}" for member in parts.values()))
                    continue
                if len(images) > 1:
                    names = some(sorted(member.name for member in images))
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
        return clean(lines_of(read_at(file, text.offset_data, min(text.size, MAX_TEXT + 1)), where), where)
    if record is not None:
        where = f"{shard}: {cut(record.name)}"
        parsed = record_of(read_at(file, record.offset_data, min(record.size, MAX_RECORD + 1)), where)
        return clean(column(parsed, caption_column, where), where)
    return ()


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
