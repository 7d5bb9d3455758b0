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

from gspn.ops import Direction, line_scan, stochastic_taps
from gspn.ops.projections import project, project_taps


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
        segment: as for :func:`gspn.line_scan`, counted in turned columns.
        impl: as for :func:`gspn.line_scan`.

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
    for d, direction in enumerate(directions):
        turned = turn(x, direction)
        taps = stochastic_taps(project_taps(proxy, tap_proj[d]), direction="right").to(x.dtype)
        lam = project(proxy, lam_proj[d]).to(x.dtype)
        h = line_scan(turned, taps, lam, direction="right", segment=segment, impl=impl)
        out = project(proxy, u_proj[d] * merge[d]) * h
        if skip_proj is not None:
            out = out + project(proxy, skip_proj[d] * merge[d]) * turned
        y = out if y is None else y + out
    return cast("Tensor", y)
