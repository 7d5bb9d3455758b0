"""Figures of matplotlib, which is imported only where one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._files import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write a figure, replacing the file as a whole or not at all."""
    with replaced(path) as part:
        figure.savefig(part, dpi=dpi, facecolor="white")


def require_matplotlib() -> None:
    """Raise ImportError, with the way to install it, unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError('a plot needs matplotlib; pip install "gspn[plot]".') from None
