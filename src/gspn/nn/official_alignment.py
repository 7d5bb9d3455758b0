"""The arithmetic of the authors' official classifier, which only its checkpoints need.

The official code transposes and flips the input so that each direction is scanned from left to right. It does not
reorient the maps of taps, gates and skip with the input, and it adds the four results without reorienting them back. So
pixel (i, j) of the sum holds the states of four different pixels, each computed with the maps of other pixels. Weights
trained this way reach their accuracy only this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ..ops import Direction, propagate


def reorient(x: Tensor, direction: Direction) -> Tensor:
    """Transpose and flip ``[..., H, W]``, as the official code does: ``direction`` then runs from left to right."""
    if direction in ("down", "up"):
        x = x.transpose(-1, -2)
    return x.flip(-1) if direction in ("up", "left") else x


def propagate_official(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    merge: Tensor, *, directions: Sequence[Direction], segment: int | None, impl: str,
) -> Tensor:  # fmt: skip
    r"""The misaligned sum of the official classifier.

    .. math::
        y = \sum_d m_d \bigl( u_d \odot \mathrm{line\_scan}_{right}(R_d x,\, w_d,\, \lambda_d) + s_d \odot R_d x \bigr)

    where :math:`R_d` is :func:`reorient` for direction d. Arguments and result are those of :func:`gspn.propagate`, for
    square maps; ``segment`` counts reoriented columns.

    Raises:
        ValueError: the map is not square.
    """
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{x.shape=}: alignment='official' needs H == W; use square inputs, or alignment='image'.")
    y = None
    # "right" comes first, as it needs no reorientation: a sum takes the memory layout of its first term, here x's.
    for d in sorted(range(len(directions)), key=lambda d: directions[d] != "right"):
        own = slice(d, d + 1)
        out = propagate(
            reorient(x, directions[d]), proxy, tap_proj[own], lam_proj[own], u_proj[own],
            None if skip_proj is None else skip_proj[own], merge[own], directions=["right"], segment=segment, impl=impl,
        )  # fmt: skip
        y = out if y is None else y + out
    return cast("Tensor", y)
