"""``GSPN2d``: the maps predicted from a proxy, four scans with them, and their merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ..ops import DIRECTIONS, Direction, propagate
from ..ops import flop_counts as _flop_counts  # noqa: F401  (lets torch's counter see the scans)
from ..ops.directions import scan_axes
from ..ops.implementations import check_impl
from ..ops.valid_size import Sizes
from ..ops.validation import check_directions, check_reference_lines, check_scannable, check_segment
from .official_alignment import propagate_official
from .options import check_options

Alignment = Literal["image", "official"]

# These functions check their arguments in Python, which torch.fx cannot trace: their calls become nodes of the graph.
for _name in ("propagate", "propagate_official", "over_normalized_axis", "_checked"):
    torch.fx.wrap(_name)


@register_notrace_module  # timm's feature extraction takes the whole module as one node
class GSPN2d(nn.Module):
    """Propagation in four directions with taps, gates and skip predicted from the input.

    With the proxy ``p = W x`` of S channels and, for each direction d, the linear maps ``T_d`` to the taps, ``Λ_d``,
    ``U_d`` and ``S_d`` of it::

        y = Σ_d m_d ( U_d p · line_scan_d(x, stochastic_taps(T_d p), Λ_d p) + S_d p · x )

    All maps are linear in the proxy, pixel by pixel, and the proxy is linear in x unless ``proxy_bias``. This is GSPN
    (arXiv 2501.12381, section 3.3 and figure 3) with the input-dependent skip ``S_d`` of the authors' models.
    ``groups=1`` shares the taps between all channels, which is GSPN-2 (arXiv 2512.07884). There is no positional
    embedding, and any height and width will do. The result has the memory layout of the input. The maps are never
    written to memory: :func:`gspn.propagate` computes everything after the proxy, in one call, or in one call for each
    direction with ``alignment="official"``.

    Args:
        dim: channels C of the map.
        proxy_dim: channels S of the proxy.
        groups: number G of groups of channels that share taps, a divisor of ``dim``; None for ``dim``, taps for each
            channel.
        segment: lines after which the scans restart; None for global scans, which connect every pixel with every other.
        skip: whether to add the input-dependent skip.
        proxy_bias: whether the proxy has a bias, which gives taps and gates a part that does not depend on the input.
        directions: the directions of :data:`gspn.DIRECTIONS` to scan in.
        reference_lines: a number of lines ``L0``, usually that of the maps in training; the input gate of a
            direction of L lines is multiplied by ``L0 / L``, with L that of the segment where it is shorter. The
            state of every size is then bounded as that of ``L0`` lines, ``|h| <= L0 max |lam x|``.
            None is the paper's operator, whose states grow with L.
        alignment: ``"image"`` is the paper's operator: maps and results stay at their pixels. ``"official"`` is the
            arithmetic of the authors' published classifier. Its maps are not reoriented with the input of a direction,
            and its results are added without being reoriented back. It computes something else, for square maps only,
            and exists so that checkpoints trained that way give what they were trained to give.
        impl: as for :func:`gspn.propagate`.

    Shape:
        ``[B, C, H, W]`` to ``[B, C, H, W]``.

    Raises:
        TypeError: ``segment`` or ``reference_lines`` is not an integer, or a map is not floating point.
        ValueError: an option does not fit, a map does not have the shape above, or ``alignment="official"`` meets a map
            that is not square.

    Example:
        >>> import torch
        >>> from gspn.nn import GSPN2d
        >>> GSPN2d(32, proxy_dim=4)(torch.randn(2, 32, 7, 5)).shape
        torch.Size([2, 32, 7, 5])
    """

    def __init__(
        self, dim: int, *, proxy_dim: int = 8, groups: int | None = None, segment: int | None = None, skip: bool = True,
        proxy_bias: bool = False, directions: Sequence[Direction] = DIRECTIONS, reference_lines: int | None = None,
        alignment: Alignment = "image", impl: str = "auto", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        groups = dim if groups is None else groups
        check_options("count", dim=dim, proxy_dim=proxy_dim, groups=groups)
        check_options("flag", skip=skip, proxy_bias=proxy_bias)
        if dim % groups:
            raise ValueError(
                f"{groups=} does not divide {dim=}; use 1 (shared taps), {dim} or None (per-channel taps) or a divisor."
            )
        check_segment(segment)
        check_reference_lines(reference_lines)
        check_directions(directions)
        if alignment not in get_args(Alignment):
            raise ValueError(f"{alignment=}: use one of {get_args(Alignment)}.")
        if alignment == "official" and tuple(directions) != DIRECTIONS:
            raise ValueError(f"{alignment=} scans in all four directions; for {directions=} use alignment='image'.")
        check_impl(impl)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.proxy_dim = proxy_dim
        self.groups = groups
        self.segment = segment
        self.directions = tuple(directions)
        self.reference_lines = reference_lines
        self.alignment = alignment
        self.impl = impl

        count = len(self.directions)
        self.proxy = nn.Conv2d(dim, proxy_dim, 1, bias=proxy_bias, **dd)
        self.tap_proj = nn.Parameter(torch.empty(count, groups, 3, proxy_dim, **dd))
        self.lam_proj = nn.Parameter(torch.empty(count, dim, proxy_dim, **dd))
        self.u_proj = nn.Parameter(torch.empty(count, dim, proxy_dim, **dd))
        self.skip_proj = nn.Parameter(torch.empty(count, dim, proxy_dim, **dd)) if skip else None
        self.merge = nn.Parameter(torch.empty(count, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the projections as those of a 1x1 convolution without bias, and the merge as a plain sum."""
        self.proxy.reset_parameters()
        bound = 1 / math.sqrt(self.proxy_dim)
        for projection in (self.tap_proj, self.lam_proj, self.u_proj, self.skip_proj):
            if projection is not None:
                nn.init.uniform_(projection, -bound, bound)
        nn.init.ones_(self.merge)

    def forward(self, x: Tensor, valid_size: Sizes | None = None) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``; ``valid_size`` as for :func:`gspn.propagate`.

        Raises:
            NotImplementedError: there are sizes, and an option that depends on the size of the map:
                ``reference_lines`` or ``alignment="official"``.
        """
        x = _checked(x, self.dim)
        sizes: dict[str, Any] = {} if valid_size is None else {"valid_size": valid_size}
        if sizes and (self.reference_lines is not None or self.alignment == "official"):
            raise NotImplementedError(
                f"valid_size is not for reference_lines={self.reference_lines}, alignment={self.alignment!r}, which "
                "depend on the size of the map; pass images of each size in a batch of their own."
            )
        # Under autocast the proxy may have another dtype than x; the scan runs in that of x.
        proxy = self.proxy(x).to(x.dtype)  # [B, S, H, W]
        lam_proj = over_normalized_axis(self.lam_proj, x, self.directions, self.segment, self.reference_lines)
        function = propagate_official if self.alignment == "official" else propagate
        return function(
            x, proxy, self.tap_proj, lam_proj, self.u_proj, self.skip_proj, self.merge, directions=self.directions,
            segment=self.segment, impl=self.impl, **sizes,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options that differ from the defaults, for a printed model."""
        options = {
            "groups": (self.groups, self.dim), "segment": (self.segment, None),
            "skip": (self.skip_proj is not None, True), "proxy_bias": (self.proxy.bias is not None, False),
            "directions": (self.directions, DIRECTIONS), "reference_lines": (self.reference_lines, None),
            "alignment": (self.alignment, "image"),
        }  # fmt: skip
        changed = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([f"{self.dim}", f"proxy_dim={self.proxy_dim}", *changed])


def over_normalized_axis(
    lam_proj: Tensor, x: Tensor, directions: Sequence[Direction], segment: int | None, reference_lines: int | None
) -> Tensor:
    """``lam_proj`` of scans over an axis of unit length: times ``L0 / L`` for each direction of ``x``.

    ``lam_proj`` is ``[D, C, S]`` and ``x`` a map; the other arguments are those of :class:`GSPN2d`. A projection in
    half precision becomes float32, so that small factors do not underflow. Without ``reference_lines`` it is returned
    as it is.
    """
    if reference_lines is None:
        return lam_proj
    wide = lam_proj.to(torch.promote_types(lam_proj.dtype, torch.float32))
    # Multiplied by numbers: a tensor of factors would be copied to the device in every call. The minimum is symbolic,
    # because a comparison would bind a traced graph to the sizes on one side of the segment.
    scaled = []
    for own, direction in zip(wide, directions, strict=True):
        lines: Any = x.shape[scan_axes(direction).line]
        if isinstance(lines, Tensor):  # while torch.jit.trace records
            lines = lines.double() if segment is None else lines.double().clamp(max=segment)
        elif segment is not None:
            lines = torch.sym_min(lines, segment)
        scaled.append(own * (reference_lines / lines))
    return torch.stack(scaled)


def _checked(x: Tensor, dim: int) -> Tensor:
    check_scannable("x", x)
    if x.dim() != 4 or x.shape[1] != dim:
        raise ValueError(f"{x.shape=}: this GSPN2d takes [B, {dim}, H, W].")
    return x
