"""The Earth as images with maps, split by longitude."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..._errors import UsageError
from ..base import digest_of
from ..maps.base import Map, MapClasses, MappedImages, MapTransform
from ..splits import find_split
from .build import default_cache, open_earth
from .climates import NONE, climate_classes

SPLITS = {"train": (110, 365), "val": (10, 55), "test": (60, 105)}
"""Degrees east at which the bands of longitude begin and end. The five degrees between two bands are in no split."""

_LEAST_LAND = 0.05  # of a tile
_WATER_AND_LAND = MapClasses(("water", "land"), ((40, 84, 140), (214, 196, 140)))

Target = Literal["climate", "land", "elevation"]


class Earth(MappedImages):
    """NASA's Blue Marble in plate carrée, 15 pixels a degree, with a map of the same size; see ``open_maps``.

    **Targets.** ``"climate"``: 18 Köppen-Geiger climates, see :data:`~gspn.data.earth.climates.CLIMATES`; the sea is
    ignored. ``"land"``: water and land. ``"elevation"``: metres above the sea, of steps of 25 m and of 2048 x 1024
    points, enlarged; the sea is ignored.

    **Split.** By longitude, see :data:`SPLITS`: ``"train"`` from 110° E over the Pacific and the Atlantic to 5° E,
    ``"val"`` from 10° E to 55° E (Europe, Africa, Arabia), ``"test"`` from 60° E to 105° E (India, the Himalayas,
    Siberia). ``"all"`` is the whole map as one image.

    **Images.** Validation and test images are one band each. Training images are square tiles, so many in a row that
    they are equally dense everywhere on the sphere, of which at least 5 % are land.

    Args:
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``.
        root: the cache that ``gspn dense earth`` has built; None for the default one.
        target: the map.
        tile: height and width of the images in pixels; None for tiles of 2/7 of the height in training, and for whole
            bands otherwise.

    Raises:
        UsageError: there is no Earth in the cache, or no elevation in it; a tile that is larger than the band.
        ValueError: the split is unknown.
    """

    def __init__(
        self,
        split: str = "train",
        root: str | os.PathLike[str] | None = None,
        *,
        target: Target = "climate",
        tile: int | None = None,
        transform: MapTransform | None = None,
    ) -> None:
        if target not in ("climate", "land", "elevation"):
            raise UsageError(f"target={target!r} is not a map of the Earth: climate, land or elevation.")
        self._maps = open_earth(Path(root) if root is not None else default_cache())
        if target not in self._maps.arrays:
            raise UsageError(
                f"{self._maps.root} has no elevation; build it again with: gspn dense earth --elevation FILE"
            )
        classes = {"climate": climate_classes(), "land": _WATER_AND_LAND, "elevation": None}[target]
        super().__init__(f"earth/{target}", classes, "m" if classes is None else None, transform)
        self.target: Target = target
        self.split = find_split(split, tuple(SPLITS), "the Earth")
        self.boxes = self._boxes(tile)

    def __len__(self) -> int:
        return len(self.boxes)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        return Image.fromarray(self._part("image", index))

    def map(self, index: int) -> Map:
        """The map of image ``index``."""
        values = self._part(self.target, index)
        if self.target == "land":
            return values.astype(np.float32)
        ignored = values == NONE if self.target == "climate" else self._part("land", index) == 0
        return np.where(ignored, np.float32(np.nan), values.astype(np.float32))

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The place of image ``index``: its first row and column, height and width."""
        del basename, absolute
        return f"{self.name}/{'-'.join(map(str, self.boxes[index]))}"

    def identity(self) -> str:
        """A digest of the places of the images and of the checksums of the maps."""
        return digest_of([self._maps.digest, *(self.filename(i) for i in range(len(self)))])

    def _part(self, kind: str, index: int) -> NDArray[Any]:
        top, left, height, width = self.boxes[index]
        rows = self._maps.arrays[kind][top : top + height]
        whole = rows.shape[1]
        # A box may go beyond 180 degrees east, where the map begins again.
        parts = [rows[:, left : min(left + width, whole)], rows[:, : max(left + width - whole, 0)]]
        return np.concatenate(parts, 1)

    def _boxes(self, tile: int | None) -> list[tuple[int, int, int, int]]:
        """Row, column, height and width of each image."""
        height = self._maps.height
        first, last = SPLITS.get(self.split, (-180, 180))
        left, width = round((first + 180) * height / 180), round((last - first) * height / 180)
        if tile is None:
            if self.split != "train":
                return [(0, left % (2 * height), height, width)]
            tile = height * 2 // 7
        if not isinstance(tile, int) or not 1 <= tile <= min(height, width):
            raise UsageError(f"tile={tile!r} is not the side of a tile; it may have 1 to {min(height, width)} pixels.")
        boxes = []
        land = np.asarray(self._maps.arrays["land"], np.int32)
        # The land above and to the left of each pixel gives that of a tile by four numbers.
        sums = np.pad(
            np.concatenate([land, land], 1).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32), ((1, 0), (1, 0))
        )
        for top in _spread(height - tile, tile // 8):
            latitude = math.radians(90 - (top + tile / 2) * 180 / height)
            for offset in _spread(width - tile, tile / 8 / max(math.cos(latitude), 0.01)):
                begin = (left + offset) % (2 * height)
                corners = sums[[top, top + tile]][:, [begin, begin + tile]]
                if corners[1, 1] - corners[0, 1] - corners[1, 0] + corners[0, 0] >= _LEAST_LAND * tile * tile:
                    boxes.append((top, begin, tile, tile))
        if not boxes:
            raise UsageError(f"{tile=}: no tile has enough land; take another size.")
        return boxes


def _spread(last: int, step: float) -> list[int]:
    """Numbers from 0 to ``last``, evenly and about ``step`` apart."""
    count = max(round(last / max(step, 1)), 0) + 1
    return [round(i * last / max(count - 1, 1)) for i in range(count)] if count > 1 else [last // 2]
