"""Modules: the propagation in four directions, the token mixer around it, and the block of a network."""

from .block import GSPNBlock
from .gspn2d import GSPN2d
from .mixer import GSPNMixer

__all__ = ["GSPN2d", "GSPNBlock", "GSPNMixer"]
