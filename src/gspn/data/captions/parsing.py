"""Captions as they come out of files that nobody has checked, and where a split lies."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MAX_TEXT = 1 << 16
"""Bytes of a ``.txt``: beyond them it holds something else than captions."""
MAX_RECORD = 1 << 20
"""Bytes of a ``.json``, or of one line of metadata."""
TEXT_COLUMN = "text"

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "eval", "evaluation")
SPLIT_NAMES = (*_TRAIN, *_VAL, "test")
"""What a folder, or the beginning of a shard's name, is called that holds a split."""
_SHOWN = 5
_LONGEST_SHOWN = 80


class CaptionTexts:
    """The captions of many images as one run of bytes.

    Ten million strings would cost a gigabyte more than their letters, and as much again in each worker.

    Example:
        >>> texts = CaptionTexts()
        >>> texts.append(["a cat", "a tabby"])
        >>> texts[0], len(texts)
        (('a cat', 'a tabby'), 1)
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def append(self, captions: Sequence[str]) -> None:
        """The captions of the next image, as ``clean`` returns them: no line break in any."""
        self._bytes += "\n".join(captions).encode()
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return tuple(self._bytes[self._ends[index] : self._ends[index + 1]].decode().split("\n"))


def clean(value: Any, where: str) -> tuple[str, ...]:
    """Captions from a string, or a list of them, with single blanks; those that are empty are left out.

    Args:
        value: what was read; None counts as no caption.
        where: it was read, for errors.

    Raises:
        ValueError: the value is something else, or no text that can be encoded.

    Example:
        >>> clean(["a  cat ", "", "a tabby"], "line 1")
        ('a cat', 'a tabby')
    """
    if value is None:
        return ()
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}: a caption is a string or a list of strings, not {cut(repr(value))}.")
    captions = tuple(caption for part in parts if (caption := " ".join(part.split())))
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise ValueError(f"{where}: {cut(repr(value))} is no valid text ({error.reason}); write it anew.") from error
    return captions


def lines_of(data: bytes, where: str) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: it is not UTF-8, or longer than captions are.
    """
    if len(data) > MAX_TEXT:
        raise ValueError(f"{where} has more than {MAX_TEXT:,} bytes, so it is no file of captions; remove it.")
    return decode(data, where).replace("\r", "\n").split("\n")


def decode(data: bytes, where: str) -> str:
    """Text from UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: it is something else.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at position {error.start}; save it as UTF-8."
        ) from error


def record_of(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is something else, or too long.
    """
    if len(data) > MAX_RECORD:
        raise ValueError(f"{where} has more than {MAX_RECORD:,} bytes; keep what is not needed for captions elsewhere.")
    text = decode(data, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object, which is written {{...}}: {cut(text)}")
    return record


def column(record: dict[str, Any], name: str, where: str) -> Any:
    """The caption column of a record.

    Raises:
        ValueError: there is none.
    """
    if name not in record:
        raise ValueError(
            f"{where} has no caption_column={name!r}; it has {some(map(repr, record))}. "
            "Pass the one that holds captions as caption_column=..."
        )
    return record[name]


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return (", ".join(map(cut, listed[:_SHOWN])) or "none") + more


def cut(text: str) -> str:
    """A text that may be of any length, for an error."""
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def split_names(split: str) -> tuple[str, ...]:
    """What a split may be called, the name that was asked for first.

    Raises:
        ValueError: the name is a path.
    """
    if split in ("", ".", "..") or "/" in split or "\\" in split:
        raise ValueError(f"{split=} is no name of a split; pass 'train', 'val', 'test', another name, or 'all'.")
    equal = _TRAIN if split in _TRAIN else _VAL if split in _VAL else ()
    return tuple(dict.fromkeys((split, *equal)))


def undivided(split: str, place: str) -> None:
    """Data without splits is what is trained on, and never what is held out from that.

    Raises:
        ValueError: another split is asked for.
    """
    if split != "all" and split not in _TRAIN:
        raise ValueError(
            f"{place} is not divided into splits, so it has no {split=}: it would be the images that are trained on. "
            "Pass split='all' to open all of it."
        )


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split: the root itself for ``"all"``, and for ``"train"`` where no folder is named as a split.

    Raises:
        ValueError: there is none, or the root is no folder.
    """
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is no folder.")
    names = split_names(split)
    if split == "all":
        return root
    for name in names:
        if (root / name).is_dir():
            return root / name
    present = [name for name in SPLIT_NAMES if (root / name).is_dir()]
    if present:
        raise ValueError(
            f"root={str(root)!r} has no folder for {split=}, but {present}. Pass one of these, or split='all' to open "
            "the root itself."
        )
    undivided(split, f"root={str(root)!r}")
    return root
