"""One image over several processes, each of which has some of its rows."""

from .rows import ImageRows

__all__ = ["ImageRows"]
