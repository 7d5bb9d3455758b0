"""The operators: one file a public function, the specification in ``reference``, kernels in ``cpu`` and ``triton``."""

from . import torch_library as _registration  # noqa: F401  (registers the operators with torch)
from .directions import DIRECTIONS, Direction
from .implementations import available_impls
from .line_scan import line_scan
from .propagate import propagate
from .stochastic_taps import stochastic_taps

__all__ = ["DIRECTIONS", "Direction", "available_impls", "line_scan", "propagate", "stochastic_taps"]
