"""Figures of matplotlib, which is imported only where one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._files import printable, replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def label(name: object) -> str:
    r"""A name of a file, class or model as a text in a figure: matplotlib takes what is between two `$` for a formula.

    Example:
        >>> print(label("$5 or $x_2$"))
        \$5 or \$x_2\$
    """
    return printable(name).replace("$", r"\$")


def save_figure(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write a figure in the format of the file's name, replacing the file as a whole or not at all."""
    with replaced(path) as part:
        figure.savefig(part, dpi=dpi, facecolor="white", format=path.suffix[1:].lower())
