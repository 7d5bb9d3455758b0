"""Damage to bytes and to values."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

import yaml

_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_HOSTILE = b"cos\nsystem\n(S'touch executed'\ntR."  # a pickle that runs a command
_HEADER = 96  # bytes at the start, where most fields are that decide


def damaged(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """``data`` with one to six kinds of damage; ``others`` are spliced in."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        _damage_once(rng, result, others)
        if len(result) < 2:
            break
    return bytes(result)


def _damage_once(rng: Random, data: bytearray, others: Sequence[bytes]) -> None:
    size = len(data)
    place = rng.randrange(min(size, _HEADER)) if rng.random() < 0.4 else rng.randrange(size)
    length = rng.choice((1, 2, 4, 8, rng.randint(1, size)))
    kind = rng.randrange(9)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:  # a number of a header, in either order of bytes
        width, order = rng.choice("BHI"), rng.choice("<>")
        field = struct.pack(order + width, rng.choice(_EDGES) & (256 ** struct.calcsize(width) - 1))
        data[place : place + len(field)] = field
    elif kind == 3:
        del data[place:]
    elif kind == 4:
        del data[place : place + length]
    elif kind == 5:  # a part once more
        at = rng.randrange(size)
        data[at:at] = data[place : place + length] * rng.choice((1, 1, 2, 50))
    elif kind == 6:
        other = rng.choice(others)
        begin = rng.randrange(len(other))
        data[place : place + rng.choice((0, length))] = other[begin : begin + length]
    elif kind == 7:
        data[place : place + length] = rng.randbytes(length)
    else:
        data += rng.randbytes(rng.randint(1, 64))


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of their content, so that damage reaches what is behind them."""
    result, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        body = data[place + 4 : place + 8 + length]
        result += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return result + data[place:]


_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, 1e-300, 1e308, -1e308, float("inf"), float("nan"), 2**31, 2**63, 10**30, "",
    " ", "\0", "a\nb", "\x1b[31mred", "\ud800", "é" * 300, "../../etc/passwd", "/etc/passwd", "nan", "²", "1e5", [], {},
    [[]], [None], {"": None}, [0] * 200, "x" * 100_000,
)  # fmt: skip


def damaged_value(rng: Random, value: Any) -> Any:
    """A copy of nested lists and mappings with one to three members replaced, removed, added or exchanged."""
    result = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 3)):
        place: Any = result
        while True:  # down to a member, the deeper ones too
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice(keys)
            inner = place[key]
            if not isinstance(inner, list | dict) or not inner or (place is not result and rng.random() < 0.3):
                break
            place = inner
        kind = rng.randrange(6)
        if kind == 0 and place is not result:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[rng.choice(("unknown", "", "\x1b[1m", "..", "é", str(key) + "s"))] = place[key]
        elif kind == 2:
            place[key] = [place[key]]
        elif kind == 3 and isinstance(place[key], int | float) and not isinstance(place[key], bool):
            place[key] = rng.choice((-place[key], place[key] + 1, place[key] * 1000, str(place[key]), place[key] / 3))
        else:
            place[key] = copy.deepcopy(rng.choice(_VALUES))
    return result[0]


def damaged_json(rng: Random, value: Any, *, indent: int | None = 1) -> bytes:
    """JSON of damaged values, or damaged text of JSON."""
    if rng.random() < 0.7:
        return json.dumps(damaged_value(rng, value), indent=indent).encode("utf-8", "surrogatepass")
    return damaged_text(rng, json.dumps(value, indent=indent).encode())


def damaged_text(rng: Random, text: bytes) -> bytes:
    """Damage that files of text have: to bytes, in another encoding, or nested deeply."""
    kind = rng.randrange(8)
    if kind == 0:
        return text.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    if kind == 1:
        place = rng.randrange(len(text) + 1)
        return text[:place] + rng.choice((b"[", b"{", b'{"a":', b"- ", b"? ")) * rng.choice((100, 5000)) + text[place:]
    return damaged(rng, text, [text, b"\xff\xfe\0", b"!!python/object/apply:os.system [id]", b"&a [*a, *a]", b"\r\n\t"])


def damaged_file(rng: Random, name: str, data: bytes) -> bytes:
    """The content of a file, with damage that its format has."""
    suffix = name.rpartition(".")[2]
    if suffix == "json":
        return damaged_json(rng, json.loads(data))
    if suffix == "jsonl":
        return _damaged_lines(rng, data)
    if suffix == "yaml":
        return _damaged_yaml(rng, data)
    if suffix in ("txt", "csv"):
        return damaged_text(rng, data)
    if suffix == "safetensors":
        return _damaged_safetensors(rng, data)
    if suffix == "npz":
        return _damaged_npz(rng, data)
    if suffix == "tar":
        return _damaged_tar(rng, data)
    if suffix == "png":
        return _damaged_png(rng, data)
    return _damaged_zip(rng, data) if data.startswith(b"PK") else damaged(rng, data, [data])


def _damaged_lines(rng: Random, data: bytes) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(rng, json.loads(lines[at]), indent=None)
    return b"\n".join(lines) if rng.random() < 0.8 else damaged_text(rng, data)


def _damaged_yaml(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return damaged_text(rng, data)
    # JSON is YAML, but for what its parser takes for the end of the file.
    return damaged_json(rng, yaml.safe_load(data))


def _damaged_safetensors(rng: Random, data: bytes) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.3:
        return damaged(rng, data, [data])
    header = damaged_json(rng, json.loads(data[8 : 8 + length]), indent=None)
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", size) + header + data[8 + length :]


def _damaged_zip(rng: Random, data: bytes) -> bytes:
    """A file of PyTorch, with damage to a member of it that its checksums do not show."""
    if rng.random() < 0.3:
        return damaged(rng, data, [data])
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, damaged(rng, content, [content, _HOSTILE]) if name == chosen else content)
    return file.getvalue()


def _damaged_npz(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return damaged(rng, data, [data])
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if rng.random() < 0.7:
                shape = rng.choice(
                    (b"(-1, 8, 8, 3)", b"(1000000000000, 1, 1, 3)", b"(2, 8, 8, 3,", b"()", b"(0, 0, 0, 3)")
                )
                kind = rng.choice((b"'|O'", b"'<f8'", b"'<U9'", b"[('a', '|u1')]", b"'|V1'", b"'?'"))
                content = rng.choice(
                    (
                        damaged(rng, content, [content]),
                        content.replace(b"(2, 8, 8, 3)", shape, 1),
                        content.replace(b"'|u1'", kind, 1),
                    )
                )
            new.writestr(name if rng.random() < 0.9 else "../" + name, content)
    return file.getvalue()


def _damaged_tar(rng: Random, data: bytes) -> bytes:
    result = bytearray(damaged(rng, data, [data]))
    if rng.random() < 0.3:  # a field of a header
        at = 512 * rng.randrange(max(len(data) // 512, 1))
        field, width = rng.choice(((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (345, 155), (257, 6)))
        result = bytearray(data)
        value = rng.choice(
            (b"../x.png", b"/etc/passwd", b"\xff" * width, b"-1", b"7" * 11, b"\0", b"S", b"2", b"x", b"L")
        )
        result[at + field : at + field + width] = value[:width].ljust(width, b"\0")
    for at in range(0, len(result) - 511, 512):  # so that damage reaches what is behind the checksum
        if result[at + 257 : at + 262] == b"ustar" and rng.random() < 0.8:
            result[at + 148 : at + 156] = b" " * 8
            result[at + 148 : at + 156] = b"%06o\0 " % sum(result[at : at + 512])
    return bytes(result)


def _damaged_png(rng: Random, data: bytes) -> bytes:
    at = data.find(b"tEXt")
    if at < 0 or rng.random() < 0.3:
        result = damaged(rng, data, [data])
        return with_checksums(result) if rng.random() < 0.6 else result
    (length,) = struct.unpack_from(">I", data, at - 4)
    keyword, _, text = data[at + 4 : at + 4 + length].partition(b"\0")
    body = keyword + b"\0" + damaged_json(rng, json.loads(text), indent=None)
    return with_checksums(data[: at - 4] + struct.pack(">I", len(body)) + b"tEXt" + body + data[at + 4 + length :])
