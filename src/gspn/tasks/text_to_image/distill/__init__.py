"""Distil a pipeline's self-attention into a GSPN adapter."""

from typing import TYPE_CHECKING

from gspn._lazy import lazy_exports

from .config import AdapterConfig, DistillationConfig, DistillConfig

if TYPE_CHECKING:
    from .training import distill

__all__ = ["AdapterConfig", "DistillConfig", "DistillationConfig", "distill"]

# It needs diffusers and accelerate, which reading a configuration does not.
__getattr__, __dir__ = lazy_exports(__name__, {"distill": ".training"}, eager=__all__)
