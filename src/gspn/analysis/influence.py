"""The affinity of one pixel to every other: rows of the affinity matrix, computed without the matrix.

With fixed maps (taps, ``lam``, ``u``) :class:`gspn.nn.GSPN2d` is linear in its input. So its row for a pixel is a
vector-Jacobian product: one scan in each direction computes ``y_i = u_i Σ_j G_ij x_j``, the attention form of
GSPN (arXiv 2501.12381, section 3.1), for all channels, where ``G`` itself has ``(H W)^2`` entries for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import UsageError
from ..nn import GSPN2d
from ..ops import Direction
from .scans import choose_scan, scans_of, visit_scans


@dataclass(frozen=True)
class Influence:
    """The influence of every pixel on one pixel through one :class:`gspn.nn.GSPN2d`, as maps of the module's input."""

    query: tuple[int, int]
    """The pixel that is influenced, (row, column)."""
    merged: Tensor
    """``[H, W]``: the affinity to each pixel, with all directions and the skip; the mean magnitude over channels."""
    directions: Mapping[Direction, Tensor]
    """``[H, W]`` each: the same for one direction, with its merge weight and without the skip."""
    reach: Mapping[Direction, Tensor]
    """``[H, W]`` each: the propagation weights alone (``lam = u = 1``), the mean over groups. They are not negative and
    sum to one on each line that is reached."""


@dataclass(frozen=True)
class ImageInfluence:
    """An :class:`Influence` inside a model, with its maps at the image's size."""

    name: str
    """The module's name in the model."""
    point: tuple[int, int]
    """The query point in the image, (x, y)."""
    influence: Influence
    """At the size of the module's input."""
    merged: Tensor
    """``[H, W]`` of the image, interpolated bilinearly, as are the maps below."""
    directions: Mapping[Direction, Tensor]
    reach: Mapping[Direction, Tensor]


def affinity_rows(module: GSPN2d, x: Tensor, query: tuple[int, int]) -> tuple[dict[Direction, Tensor], Tensor]:
    """Compute one row of the affinity matrix for each channel, with its sign::

        A_ij = Σ_d m_d u_d,i G^d_ij + [i = j] Σ_d m_d s_d,i        y_i = Σ_j A_ij x_j

    The maps are computed from the input and then fixed. So this is not the derivative of y, which changes them too.

    Args:
        module: the propagation.
        x: the input of the module, ``[1, C, H, W]``.
        query: pixel i, (row, column).

    Returns:
        ``[C, H, W]`` for each direction, ``m_d u_d,i G^d_ij``, and ``[C, H, W]`` for A; float32, or float64 if
        ``x`` is.

    Raises:
        ValueError: ``x`` has another shape, or the query is outside of it.

    Example:
        >>> import torch
        >>> from gspn.analysis import affinity_rows
        >>> from gspn.nn import GSPN2d
        >>> module, x = GSPN2d(8), torch.randn(1, 8, 5, 6)
        >>> _, row = affinity_rows(module, x, (2, 4))
        >>> torch.allclose((row * x[0]).sum((1, 2)), module(x)[0, :, 2, 4], atol=1e-5)
        True
    """
    if x.dim() != 4 or x.shape[0] != 1 or x.shape[1] != module.dim:
        raise ValueError(f"{x.shape=}: pass the input of one image, [1, {module.dim}, H, W].")
    if not (0 <= query[0] < x.shape[2] and 0 <= query[1] < x.shape[3]):
        raise ValueError(f"{query=} is outside the map of {x.shape[2]} x {x.shape[3]}; pass (row, column), from 0.")
    if module.alignment == "official" and x.shape[2] != x.shape[3]:
        raise UsageError(f"{x.shape=}: alignment='official' needs H == W.")
    with torch.inference_mode(False):
        x = x.clone()  # a tensor made in inference mode cannot be differentiated
        scans = scans_of(module, x)
        rows: dict[Direction, Tensor] = {}
        for scan in scans:  # channels do not mix, so one product with ones over the channels is the row of each
            rows[scan.direction] = _vjp(scan.states, x.to(scan.taps.dtype), _one_pixel(scan.u, query))
        merged = torch.stack(list(rows.values())).sum(0)
        for scan in scans:
            if scan.skip is not None:
                merged += _vjp(scan.reoriented, x.to(merged.dtype), _one_pixel(scan.skip, query))
    return rows, merged


def pixel_influence(module: GSPN2d, x: Tensor, query: tuple[int, int]) -> Influence:
    """Compute the influence of every pixel on one pixel, as the mean magnitude over channels.

    Signs differ between channels and would cancel in a sum: a pixel that half of the channels add and the other half
    subtract still has influence. Arguments and errors are those of :func:`affinity_rows`, which returns every channel
    with its sign.

    Example:
        >>> import torch
        >>> from gspn.analysis import pixel_influence
        >>> from gspn.nn import GSPN2d
        >>> influence = pixel_influence(GSPN2d(8), torch.randn(1, 8, 5, 6), (2, 4))
        >>> influence.merged.shape, [round(line, 4) for line in influence.reach["down"].sum(1).tolist()]
        (torch.Size([5, 6]), [1.0, 1.0, 1.0, 0.0, 0.0])
    """
    rows, merged = affinity_rows(module, x, query)
    reach: dict[Direction, Tensor] = {}
    with torch.inference_mode(False):
        for scan in scans_of(module, x.clone()):
            ones = torch.ones_like(scan.taps[:, :, 0])  # [1, G, H, W]
            reach[scan.direction] = _vjp(replace(scan, lam=None).states, ones, _one_pixel(ones, query)).mean(0)
    return Influence(
        query=query,
        merged=merged.abs().mean(0),
        directions={direction: row.abs().mean(0) for direction, row in rows.items()},
        reach=reach,
    )


def image_influence(
    model: nn.Module,
    image: Tensor,
    point: tuple[int, int],
    *,
    name: str | None = None,
    stage: int = -1,
    block: int = -1,
) -> ImageInfluence:
    """Compute :func:`pixel_influence` of a scan inside a model, on an image.

    Args:
        model: the model.
        image: ``[1, in_chans, H, W]``, normalized for the model.
        point: the query, (x, y) in pixels of the image.
        name: the module, one of :func:`gspn.analysis.scans.find_scans`; None to choose it by stage and block.
        stage: index of the stage; a negative index counts from the end.
        block: index of the block in that stage; a negative index counts from the end.

    Returns:
        The maps at the size of the module's input, and interpolated to the image's.

    Raises:
        ValueError: the image's shape, the point, or the module does not fit.

    Example:
        >>> import torch
        >>> from gspn.analysis import image_influence
        >>> from gspn.models import GSPN
        >>> model = GSPN(dims=(16, 32), depths=(1, 1))
        >>> result = image_influence(model, torch.randn(1, 3, 40, 64), (50, 10), stage=0)
        >>> result.name, result.influence.query, result.influence.merged.shape, result.merged.shape
        ('stages.0.blocks.0.mixer.gspn', (2, 12), torch.Size([10, 16]), torch.Size([40, 64]))
    """
    if image.dim() != 4 or image.shape[0] != 1:
        raise ValueError(f"{image.shape=}: pass one image, [1, in_chans, H, W].")
    height, width = image.shape[-2:]
    px, py = point
    if not (0 <= px < width and 0 <= py < height):
        raise ValueError(f"{point=} is outside the image of {width} x {height} pixels; pass (x, y), counted from 0.")
    name = choose_scan(model, stage, block) if name is None else name
    influences: list[Influence] = []

    def visit(_: str, module: GSPN2d, x: Tensor) -> None:
        rows, columns = x.shape[-2:]
        influences.append(pixel_influence(module, x, (py * rows // height, px * columns // width)))

    visit_scans(model, image, visit, [name])
    (influence,) = influences

    def enlarged(map_: Tensor) -> Tensor:
        return F.interpolate(map_[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]

    return ImageInfluence(
        name=name,
        point=point,
        influence=influence,
        merged=enlarged(influence.merged),
        directions={d: enlarged(m) for d, m in influence.directions.items()},
        reach={d: enlarged(m) for d, m in influence.reach.items()},
    )


def _one_pixel(map_: Tensor, query: tuple[int, int]) -> Tensor:
    """The map at the query, and zero elsewhere."""
    cotangent = torch.zeros_like(map_)
    cotangent[..., *query] = map_[..., *query]
    return cotangent


def _vjp(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    """The vector-Jacobian product for one image, ``[C, H, W]``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (product,) = torch.autograd.grad(function(x), x, cotangent.to(x.dtype))
    return product[0].detach()
