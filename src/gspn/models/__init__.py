"""Models, registered with timm on import: ``import gspn.models`` and then ``timm.create_model("gspn_tiny")``.

:class:`GSPNDenoiser2DModel` is a diffusers model; diffusers is imported only when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .._errors import MissingExtraError
from .gspn import GSPN

if TYPE_CHECKING:
    from .denoiser import GSPNDenoiser2DModel


def __getattr__(name: str) -> Any:
    if name == "GSPNDenoiser2DModel":
        try:
            importlib.import_module("diffusers")
        except ModuleNotFoundError:
            raise MissingExtraError("GSPNDenoiser2DModel needs diffusers: pip install 'gspn[diffusers]'") from None
        return importlib.import_module(".denoiser", __name__).GSPNDenoiser2DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = ["GSPN", "GSPNDenoiser2DModel"]
