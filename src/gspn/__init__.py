"""GSPN, the Generalized Spatial Propagation Network: attention replaced by line scans over the image itself."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from gspn import analysis
from gspn.ops import DIRECTIONS, Direction, available_impls, line_scan, propagate, stochastic_taps

try:
    __version__ = _version("gspn")
except _PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "DIRECTIONS",
    "Direction",
    "__version__",
    "analysis",
    "available_impls",
    "line_scan",
    "propagate",
    "stochastic_taps",
]
