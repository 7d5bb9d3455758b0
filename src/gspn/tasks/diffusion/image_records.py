"""Where a generated image comes from, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..._files import replaced

METADATA = "gspn"
"""The key of an image's text in which its origin is written, as JSON."""


@dataclass(frozen=True)
class ImageRecord:
    """Where a generated image comes from; written into its file."""

    index: int
    prompt: str
    negative: str | None
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str
    pipeline: str
    adapter: str | None
    precision: str
    stages: tuple[dict[str, Any], ...]
    ladder: dict[str, Any] | None
    tiled: bool


def save_image(directory: Path, image: Image.Image, record: ImageRecord) -> None:
    """Write a PNG with the record in its text, in one step."""
    info = PngInfo()
    info.add_text(METADATA, json.dumps(asdict(record)))
    with replaced(_path(directory, record)) as part:
        image.save(part, format="PNG", pnginfo=info)


def is_drawn(directory: Path, record: ImageRecord) -> bool:
    """Whether an image is there, whole, and of this record."""
    path = _path(directory, record)
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            found = json.loads(getattr(image, "text", {}).get(METADATA, "null"))
    except (OSError, ValueError, SyntaxError):  # what Pillow says of damaged files
        return False
    return found == json.loads(json.dumps(asdict(record)))


def _path(directory: Path, record: ImageRecord) -> Path:
    return directory / f"{record.index:05d}.png"
