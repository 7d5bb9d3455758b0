"""Networks, registered with timm on import: ``import gspn.models`` and then ``timm.create_model("gspn_tiny")``."""

from .gspn import GSPN

__all__ = ["GSPN"]
