"""The four directions of a scan and the axes of an image tensor that each of them walks.

Four is fixed. A diagonal scan would need lines of changing length, and taps that are not neighbours on one line.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Direction = Literal["down", "up", "right", "left"]
"""The way information flows through the image."""

DIRECTIONS: Final[tuple[Direction, ...]] = ("down", "up", "right", "left")
"""The four directions, in the order in which every per-direction tensor of the library is laid out."""


class ScanAxes(NamedTuple):
    """How one direction walks a tensor whose last two axes are ``H, W``."""

    line: int
    """The axis along which lines follow each other: -2 (rows) or -1 (columns)."""
    cross: int
    """The axis inside a line, along which the three taps reach."""
    reverse: bool
    """Whether the first line scanned is the last one of the tensor."""


_AXES: Final[dict[str, ScanAxes]] = {
    "down": ScanAxes(line=-2, cross=-1, reverse=False),
    "up": ScanAxes(line=-2, cross=-1, reverse=True),
    "right": ScanAxes(line=-1, cross=-2, reverse=False),
    "left": ScanAxes(line=-1, cross=-2, reverse=True),
}


def scan_axes(direction: str) -> ScanAxes:
    """The axes that ``direction`` walks; ValueError unless it is one of :data:`DIRECTIONS`.

    Example:
        >>> scan_axes("left")
        ScanAxes(line=-1, cross=-2, reverse=True)
    """
    # Not `_AXES.get`: a caller may pass anything, an unhashable list included.
    if not isinstance(direction, str) or direction not in _AXES:
        raise ValueError(f"{direction=} is not a direction; use one of {', '.join(DIRECTIONS)}.")
    return _AXES[direction]
