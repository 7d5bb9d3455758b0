"""Modules: the propagation in four directions, also in a latent space, its token mixer, the block of a model; attention
to compare with.
"""

from .._errors import MissingExtraError

try:
    import timm as _timm  # noqa: F401  (its norms, MLP and stochastic depth are used here)
except ImportError as error:
    raise MissingExtraError(f"gspn.nn needs timm: pip install 'gspn[train]' ({error})") from error

from .attention import SelfAttention2d
from .block import GSPNBlock
from .compact import CompactGSPN2d
from .gspn2d import GSPN2d
from .mixer import GSPNMixer

__all__ = ["CompactGSPN2d", "GSPN2d", "GSPNBlock", "GSPNMixer", "SelfAttention2d"]
