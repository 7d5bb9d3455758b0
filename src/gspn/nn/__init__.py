"""Modules: the propagation in four directions, the token mixer around it, and the block of a network."""

try:
    import timm as _timm  # noqa: F401  # whose norms, MLP and stochastic depth the modules are made with
except ImportError as error:
    raise ImportError(f"gspn.nn needs timm: pip install 'gspn[train]' ({error})") from error

from .block import GSPNBlock
from .gspn2d import GSPN2d
from .mixer import GSPNMixer

__all__ = ["GSPN2d", "GSPNBlock", "GSPNMixer"]
