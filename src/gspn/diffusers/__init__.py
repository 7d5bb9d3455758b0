"""Components for diffusers. Importing this module lets saved pipelines find them.

diffusers loads a component of another library only if its module has been imported.

Example:
    >>> import gspn.diffusers
    >>> from diffusers import DiTPipeline
    >>> pipeline = DiTPipeline.from_pretrained("runs/digits/pipeline")  # doctest: +SKIP
"""

from gspn._errors import MissingExtraError

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise MissingExtraError(f"gspn.diffusers needs diffusers: pip install 'gspn[diffusers]' ({error})") from error

from gspn.models.denoiser import GSPNDenoiser2DModel

from .adapter import GSPNAdapter
from .class_conditional import ClassConditionalPipeline
from .token_mixer import GSPNTokenMixer

__all__ = ["ClassConditionalPipeline", "GSPNAdapter", "GSPNDenoiser2DModel", "GSPNTokenMixer"]
