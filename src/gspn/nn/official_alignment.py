"""The arithmetic of the authors' published classifier, for its checkpoints alone.

Its four inputs are turned so that every direction is scanned from left to right. The maps of taps, gates and skip are
not turned with them, and the four results are added where they come to lie. Pixel (i, j) of the sum then holds four
different pixels' states, each scanned with the maps of yet another. A network trained so has learnt to live with it,
and gives its accuracy only so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from gspn.ops import Direction, propagate


def turn(x: Tensor, direction: Direction) -> Tensor:
    """The input as the published code scans it: from left to right, in place of ``direction``."""
    if direction in ("down", "up"):
        x = x.transpose(-1, -2)
    return x.flip(-1) if direction in ("up", "left") else x


def propagate_released(
    x: Tensor,
    proxy: Tensor,
    tap_proj: Tensor,
    lam_proj: Tensor,
    u_proj: Tensor,
    skip_proj: Tensor | None,
    merge: Tensor,
    *,
    directions: Sequence[Direction],
    segment: int | None,
    impl: str,
) -> Tensor:
    r"""The misaligned sum

    .. math::
        y = \sum_d m_d \bigl( u_d \odot \mathrm{line\_scan}_{right}(R_d x,\, w_d,\, \lambda_d) + s_d \odot R_d x \bigr)

    with :math:`R_d` the turn that brings direction d to ``"right"``.

    Args:
        x: ``[B, C, N, N]``.
        proxy: ``[B, S, N, N]``.
        tap_proj: ``[4, G, 3, S]``; the other projections are ``[4, C, S]``, ``merge`` is ``[4]``.
        lam_proj: see ``tap_proj``.
        u_proj: see ``tap_proj``.
        skip_proj: see ``tap_proj``; None for no skip.
        merge: see ``tap_proj``.
        directions: the direction of each first index.
        segment: as for :func:`gspn.propagate`, counted in turned columns.
        impl: as for :func:`gspn.propagate`.

    Returns:
        ``[B, C, N, N]``.

    Raises:
        ValueError: the map is not square.
    """
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"{x.shape=}: alignment='released' adds maps to their transposes and needs H == W; "
            "use square inputs, or alignment='image' with weights trained for it."
        )
    y = None
    # What is not turned comes first: a sum takes the memory layout of its first term, here x's.
    for d in sorted(range(len(directions)), key=lambda d: directions[d] != "right"):
        own = slice(d, d + 1)
        out = propagate(
            turn(x, directions[d]),
            proxy,
            tap_proj[own],
            lam_proj[own],
            u_proj[own],
            None if skip_proj is None else skip_proj[own],
            merge[own],
            directions=["right"],
            segment=segment,
            impl=impl,
        )
        y = out if y is None else y + out
    return cast("Tensor", y)
