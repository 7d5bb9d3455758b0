"""GSPN in the place of the attention of timm's vision transformers.

Example:
    >>> import timm, torch
    >>> from gspn.timm import GSPNAdapter
    >>> vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    >>> adapter = GSPNAdapter.from_model(vit, latent_dim=16, keep_attention=[-1])
    >>> with adapter.mounted(vit):
    ...     vit(torch.randn(1, 3, 224, 320)).shape
    torch.Size([1, 1000])
"""

from gspn._errors import MissingExtraError

try:
    import timm as _timm  # noqa: F401
except ImportError as error:
    raise MissingExtraError(f"gspn.timm needs timm: pip install 'gspn[train]' ({error})") from error

from .adapter import GSPNAdapter
from .token_mixer import GSPNTokenMixer

__all__ = ["GSPNAdapter", "GSPNTokenMixer"]
