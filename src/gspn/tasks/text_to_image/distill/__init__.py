"""Distil a GSPN adapter from a pipeline's own attention."""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

if TYPE_CHECKING:
    from .training import DistillResult, distill

# These need diffusers and accelerate, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(__name__, {"DistillResult": ".training", "distill": ".training"})

__all__ = ["DistillResult", "distill"]
