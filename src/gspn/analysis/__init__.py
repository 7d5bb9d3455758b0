"""Looking at what the operators and the networks do: affinities, stability, cost.

:func:`affinity_matrix` needs torch alone and is there at once; what looks into modules needs timm, and is imported when
it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .affinity import affinity_matrix

if TYPE_CHECKING:
    from .cost import Cost, count_cost, gspn2d_macs
    from .influence import ImageInfluence, Influence, affinity_rows, image_influence, pixel_influence
    from .stability import ScanStability, scan_stability, stability_report, write_stability

_LAZY = {
    "Cost": "cost",
    "count_cost": "cost",
    "gspn2d_macs": "cost",
    "Influence": "influence",
    "ImageInfluence": "influence",
    "affinity_rows": "influence",
    "image_influence": "influence",
    "pixel_influence": "influence",
    "ScanStability": "stability",
    "scan_stability": "stability",
    "stability_report": "stability",
    "write_stability": "stability",
}

__all__ = [
    "Cost",
    "ImageInfluence",
    "Influence",
    "ScanStability",
    "affinity_matrix",
    "affinity_rows",
    "count_cost",
    "gspn2d_macs",
    "image_influence",
    "pixel_influence",
    "scan_stability",
    "stability_report",
    "write_stability",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
