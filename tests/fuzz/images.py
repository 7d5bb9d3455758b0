"""Images of every format that is decoded, damaged, through ``gspn.data.load_image``."""

from __future__ import annotations

import functools
import io
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from gspn.data import CorruptImageError, load_image
from gspn.data.images import FORMATS

from .mutate import damaged, with_checksums
from .runner import Input, Target

_PIXELS = 1 << 22
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "PNG": [{}, {"transparency": 0}, {"optimize": True}, {"save_all": True}],
    "JPEG": [{}, {"progressive": True}, {"quality": 5, "subsampling": 2}, {"restart_marker_rows": 1}],
    "WEBP": [{}, {"lossless": True}, {"save_all": True}],
    "GIF": [{}, {"save_all": True}, {"interlace": 1}],
    "BMP": [{}],
    "TIFF": [{"compression": kind} for kind in (None, "packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4")],
    "PPM": [{}],
    "JPEG2000": [{}, {"irreversible": True}, {"tile_size": (16, 16)}, {"no_jp2": True}],
    "AVIF": [{"speed": 10}, {"speed": 10, "save_all": True}],
}


@functools.cache
def originals() -> dict[str, list[bytes]]:
    """Sound images, by format: every mode that the format can be written in, with several of its options."""
    found: dict[str, list[bytes]] = {name: [] for name in FORMATS}
    noise = np.random.default_rng(0).integers(0, 256, (40, 33, 3), np.uint8)
    noise[:20] = np.linspace(0, 255, 33, dtype=np.uint8)[:, None]  # smooth above, noise below
    frames = [Image.fromarray(np.roll(noise, 9 * i, 0)) for i in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    for name in FORMATS:
        for options in _OPTIONS[name]:
            for mode in _MODES if name != "AVIF" else ("L", "RGB", "RGBA"):
                try:
                    converted = [frame.convert(mode) for frame in frames]
                    more = {"append_images": converted[1:]} if "save_all" in options else {}
                    file = io.BytesIO()
                    converted[0].save(file, name, exif=exif, **options, **more)
                except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the format has no such mode
                    continue
                if file.getvalue() not in found[name]:
                    found[name].append(file.getvalue())
    found["PPM"] += [b"P1\n3 2\n1 0 1 0 1 0\n", b"P2\n# grey\n3 2\n15\n0 3 7 15 1 2\n", b"P3\n1 1\n255\n1 2 3\n"]
    return found


def make(rng: Random) -> Input:
    """One damaged image."""
    name = rng.choice(FORMATS)
    own = originals()[name]
    others = own if rng.random() < 0.8 else originals()[rng.choice(FORMATS)]
    data = damaged(rng, rng.choice(own), others)
    return {"image": with_checksums(data) if name == "PNG" and rng.random() < 0.6 else data}


def check(made: Input) -> None:
    """An RGB image with all its pixels, or ``CorruptImageError``."""
    try:
        image = load_image(io.BytesIO(made["image"]), max_pixels=_PIXELS, name="damaged image")
    except CorruptImageError as error:
        if error.name != "damaged image" or "\n" in error.reason:
            raise
        return
    assert image.mode == "RGB" and image.width * image.height <= _PIXELS, image
    assert len(image.resize((5, 7)).tobytes()) == 3 * 5 * 7


TARGET = Target("images", make, check, 500)
