"""The explicit matrix of a scan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Direction
from ..ops.directions import scan_axes


def affinity_matrix(
    taps: Tensor, lam: Tensor | None = None, direction: Direction = "down", segment: int | None = None
) -> Tensor:
    """The explicit matrix ``G`` with ``h = G x``, for grids small enough to hold it.

    For lines i and j, its block is::

        G_ij = w_i w_{i-1} ... w_{j+1} diag(lam_j)   for i >= j,   else 0

    with ``w_i`` the tri-diagonal matrix of line i's taps: the attention form of GSPN (arXiv 2501.12381, section 3.1).
    It is built from matrix products and independent of the recurrence, so that the two can be compared. It has
    ``(H W)^2`` entries for each channel, so it is meant for grids of some hundred pixels.

    Args:
        taps: ``[B, G, 3, H, W]``, floating point.
        lam: ``[B, C, H, W]``, where ``G`` divides ``C``; None for ones and ``C = G``.
        direction: the direction of the scan.
        segment: lines after which the recurrence restarts, at least 1; None for a global scan.

    Returns:
        ``[B, C, H W, H W]`` in the dtype of ``taps``: row ``i W + j`` holds the weight of each pixel of ``x``
        in the state at pixel ``(i, j)``, so that ``h.flatten(2) = (G @ x.flatten(2).unsqueeze(-1)).squeeze(-1)``.

    Raises:
        ValueError: a shape, the direction or the segment does not fit.

    Example:
        >>> import torch, gspn
        >>> from gspn.analysis import affinity_matrix
        >>> taps = gspn.stochastic_taps(torch.zeros(1, 1, 3, 2, 2), direction="down")
        >>> affinity_matrix(taps, direction="down")[0, 0]
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 1.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 1.0000]])
    """
    axes = scan_axes(direction)
    if taps.dim() != 5 or taps.shape[2] != 3:
        raise ValueError(f"{taps.shape=}: taps must be [B, G, 3, H, W].")
    if segment is not None and segment < 1:
        raise ValueError(f"{segment=} is below 1; pass a number of lines, or None for a global scan.")
    batch, groups, _, height, width = taps.shape
    if lam is not None and (
        lam.dim() != 4 or lam.shape[0] != batch or lam.shape[2:] != taps.shape[3:] or lam.shape[1] % groups
    ):
        raise ValueError(f"{lam.shape=} does not fit {taps.shape=}: lam must be [B, C, H, W] with G dividing C.")
    channels = groups if lam is None else lam.shape[1]
    taps = taps.repeat_interleave(channels // groups, dim=1)

    tap_lines = taps.movedim(axes.line, 0)  # [L, B, C, 3, n]
    if axes.reverse:
        tap_lines = tap_lines.flip(0)
    count, size = tap_lines.shape[0], tap_lines.shape[-1]
    steps = (
        torch.diag_embed(tap_lines[..., 0, 1:], offset=-1, dim1=-2, dim2=-1)
        + torch.diag_embed(tap_lines[..., 1, :], dim1=-2, dim2=-1)
        + torch.diag_embed(tap_lines[..., 2, :-1], offset=1, dim1=-2, dim2=-1)
    )  # [L, B, C, n, n]: w_i

    matrix = taps.new_zeros(count, size, count, size, batch, channels)
    for j in range(count):
        product = torch.eye(size, dtype=taps.dtype, device=taps.device).expand(batch, channels, size, size)
        for i in range(j, count):
            if i > j:
                if segment is not None and i % segment == 0:
                    break
                product = steps[i] @ product
            matrix[i, :, j, :] = product.permute(2, 3, 0, 1)
    if axes.reverse:
        matrix = matrix.flip(0, 2)
    if axes.line == -1:
        matrix = matrix.permute(1, 0, 3, 2, 4, 5)
    matrix = matrix.permute(4, 5, 0, 1, 2, 3).reshape(batch, channels, height * width, height * width)
    return matrix if lam is None else matrix * lam.flatten(2).unsqueeze(-2)
