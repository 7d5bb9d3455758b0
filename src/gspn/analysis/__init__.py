"""Analysis of operators and models: affinities, stability and cost.

:func:`affinity_matrix` needs torch alone. Everything else needs timm and is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports
from .affinity import affinity_matrix

if TYPE_CHECKING:
    from .cost import Cost, count_cost, gspn2d_macs
    from .influence import ImageInfluence, Influence, affinity_rows, image_influence, pixel_influence
    from .stability import ScanStability, scan_stability, stability_report, write_stability

__all__ = [
    "Cost", "ImageInfluence", "Influence", "ScanStability", "affinity_matrix", "affinity_rows", "count_cost",
    "gspn2d_macs", "image_influence", "pixel_influence", "scan_stability", "stability_report", "write_stability",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Cost", "count_cost", "gspn2d_macs"), ".cost"),
        **dict.fromkeys(
            ("ImageInfluence", "Influence", "affinity_rows", "image_influence", "pixel_influence"), ".influence"
        ),
        **dict.fromkeys(("ScanStability", "scan_stability", "stability_report", "write_stability"), ".stability"),
    },
    ["affinity_matrix"],
)
