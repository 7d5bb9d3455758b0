"""Sample images from text, at any aspect ratio and up to large sizes."""

from .progressive_upscaling import UpscalingConfig
from .sampling import SampleRequest, SampleResult, sample

__all__ = ["SampleRequest", "SampleResult", "UpscalingConfig", "sample"]
