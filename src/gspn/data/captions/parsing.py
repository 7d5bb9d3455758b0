"""Reading of captions from unchecked files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from ..._files import parse_json, printable

MAX_TEXT = 1 << 16
"""Bytes of a ``.txt``; a larger one does not hold captions."""
MAX_RECORD = 1 << 20
"""Bytes of a ``.json``, or of one line of metadata."""
_SHOWN = 5
_LONGEST_SHOWN = 80


class CaptionTexts:
    """The captions of many images in one array of bytes.

    Ten million strings would need a gigabyte more than their characters, and as much again in each worker.

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
        """Add the captions of the next image, as ``clean`` returns them: without line breaks."""
        self._bytes += "\n".join(captions).encode()
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return tuple(self._bytes[self._ends[index] : self._ends[index + 1]].decode().split("\n"))


def clean(value: Any, where: str) -> tuple[str, ...]:
    """Make captions with single blanks from a string, a list of strings or None, and leave out empty ones.

    A ValueError, of any other type or of text that cannot be encoded, names the position ``where``.

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
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise ValueError(f"{where}: {cut(repr(value))} is not valid text ({error.reason}); write it again.") from error
    return captions


def lines_of(data: bytes, where: str) -> list[str]:
    """The lines of a text file; a ValueError if it is not UTF-8, or too long."""
    if len(data) > MAX_TEXT:
        raise ValueError(f"{where} has more than {MAX_TEXT:,} bytes, so it is not a file of captions; remove it.")
    return decode(data, where).replace("\r", "\n").split("\n")


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte-order mark; a ValueError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at position {error.start}; save it as UTF-8."
        ) from error


def record_of(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; a ValueError if it is not one, or too long."""
    if len(data) > MAX_RECORD:
        raise ValueError(f"{where} has more than {MAX_RECORD:,} bytes; keep everything but captions elsewhere.")
    text = decode(data, where)
    record = parse_json(text, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object, which is written {{...}}: {cut(text)}")
    return record


def column(record: dict[str, Any], name: str, where: str) -> Any:
    """The caption column of a record; a ValueError if it is missing."""
    if name not in record:
        raise ValueError(
            f"{where} has no caption_column={name!r}; it has {some(map(repr, record))}. "
            "Pass the column of captions as caption_column=..."
        )
    return record[name]


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return (", ".join(map(cut, listed[:_SHOWN])) or "none") + more


def cut(text: str) -> str:
    """A text of any length and any characters, shortened for an error."""
    text = printable(text)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
