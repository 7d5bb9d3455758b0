"""Images and files for the tests of gspn.data."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def quadrants() -> Image.Image:
    """16 x 8, four colours: no symmetry, so that every turn shows."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :8], pixels[:4, 8:], pixels[4:, :8], pixels[4:, 8:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)
    return Image.fromarray(pixels)


def png() -> bytes:
    file = io.BytesIO()
    quadrants().save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    # Large enough that half of it has a whole header.
    file = io.BytesIO()
    quadrants().resize((256, 256)).save(file, "JPEG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it is side x side."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(9))) + _chunk(b"IEND", b"")
    )


def folder(root: Path, splits: tuple[str, ...] = ("train", "val"), per_class: int = 3) -> Path:
    """root/<split>/{cat,dog}/<n>.png"""
    for split in splits:
        for label in ("cat", "dog"):
            place = root / split / label
            place.mkdir(parents=True)
            for number in range(per_class):
                (place / f"{number}.png").write_bytes(png())
    return root


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
