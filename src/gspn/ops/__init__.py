"""The operators: one file for each public function, and one folder for each backend."""

from . import torch_library as _torch_library  # noqa: F401  (registers the operators with torch)
from .directions import DIRECTIONS, Direction
from .implementations import available_impls
from .line_scan import line_scan
from .propagate import propagate
from .stochastic_taps import stochastic_taps

__all__ = ["DIRECTIONS", "Direction", "available_impls", "line_scan", "propagate", "stochastic_taps"]
