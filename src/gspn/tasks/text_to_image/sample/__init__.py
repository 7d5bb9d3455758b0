"""Sample images from text, at any aspect ratio and up to large sizes."""

from .progressive_upscaling import LadderConfig
from .sampling import SampleResult, sample

__all__ = ["LadderConfig", "SampleResult", "sample"]
