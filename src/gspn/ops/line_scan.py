"""``gspn.line_scan``: the recurrence over lines. How it is computed is the backends' matter."""

from __future__ import annotations

from torch import Tensor

from .directions import Direction, scan_axes
from .implementations import check_impl
from .torch_library import apply_line_scan
from .valid_size import Sizes, as_valid_size
from .validation import autocast, check_is_tensor, check_segment


def line_scan(
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None = None,
    *,
    direction: Direction,
    segment: int | None = None,
    valid_size: Sizes | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scan a feature map line by line, each pixel taking a weighted sum of three neighbours on the previous line.

    For ``direction="down"``, with rows as lines::

        h[i, j] = lam[i, j] x[i, j] + Σ_k taps[k, i, j] h[i-1, j+k-1]        k = 0, 1, 2

    where neighbours that do not exist count 0 and the state before the first line is 0. The other directions are the
    same with the axes exchanged: ``"up"`` takes the row below, ``"right"`` the column to the left, ``"left"`` the
    column to the right as its previous line. Tap ``k`` always weighs the neighbour at cross-axis offset ``k - 1`` in
    image coordinates. With ``segment=n`` the recurrence restarts on every n-th line, counted from the first line
    scanned.

    This is equation (1) of GSPN (CVPR 2025, arXiv 2501.12381) without its output gate; taps that sum to one over the
    neighbours that exist (:func:`gspn.stochastic_taps`) make it stable. Then each state is a sum of as many averages as
    lines have been scanned, so it may grow linearly with them: in float16 it overflows where it passes 65504.

    The state accumulates in float32 (float64 for float64) in every implementation. Nothing is written to an input, and
    the same inputs give the same bits. Derivatives of every order exist, in reverse and in forward mode. Under
    ``torch.autocast`` the inputs, float64 excepted, are cast to the autocast dtype if that is bfloat16 and to float32
    if it is float16.

    Args:
        x: ``[B, C, H, W]``, float64, float32, bfloat16 or float16, and 8-bit floats with ``impl="reference"``; any
            strides, any H and W including 1, B may be 0.
        taps: ``[B, G, 3, H, W]``, of x's dtype and device; ``G`` divides ``C``, and ``C / G`` consecutive channels
            share the taps of their group (``G = C``: each channel its own; ``G = 1``: one set for all).
        lam: ``[B, C, H, W]``, the input gate, of x's dtype and device; None for ones.
        direction: ``"down"``, ``"up"``, ``"right"`` or ``"left"``, the way information flows.
        segment: number of lines, at least 1, after which the recurrence restarts; None for a global scan. The last
            segment may be shorter.
        valid_size: the height and width of each image, for images of several sizes in one batch: an int64 tensor
            ``[B, 2]`` on any device, or a list of pairs, each from 0 to the map's. Each image lies at the top left of
            its map and is scanned as if it were alone: scans begin and end, and segments are counted, at its own
            border. What stands in the padding has no influence; results and gradients there are 0. None for images
            that fill their maps.
        impl: ``"auto"``, the fastest that runs for this device and dtype; or one that :func:`gspn.available_impls`
            lists, which raises if it cannot run.

    Returns:
        ``h``, of the shape, dtype and device of ``x``, and of its memory layout where ``x`` is dense.

    Raises:
        TypeError: an argument is not a tensor, not floating point, or the dtypes differ; ``segment`` or ``valid_size``
            are not integers.
        ValueError: a shape, device, direction, segment, size or impl does not fit.
        NotImplementedError: the ``impl`` named cannot run on this device or dtype.
        ImportError: the ``impl`` named needs a package that is not installed.

    Example:
        With a tap of one on the pixel straight above, a column sums up:

        >>> import torch, gspn
        >>> x = torch.ones(1, 1, 4, 3)
        >>> taps = torch.zeros(1, 1, 3, 4, 3)
        >>> taps[:, :, 1] = 1.0
        >>> gspn.line_scan(x, taps, direction="down")[0, 0, :, 0]
        tensor([1., 2., 3., 4.])
        >>> gspn.line_scan(x, taps, direction="up", segment=2)[0, 0, :, 0]
        tensor([2., 1., 2., 1.])
        >>> gspn.line_scan(x, taps, direction="up", valid_size=[(3, 2)])[0, 0, :, 0]
        tensor([3., 2., 1., 0.])
    """
    scan_axes(direction)
    check_impl(impl)
    check_segment(segment)
    check_is_tensor("x", x)
    check_is_tensor("taps", taps)
    if lam is not None:
        check_is_tensor("lam", lam)
    x, taps, lam = autocast(x, taps, lam)
    return apply_line_scan(x, taps, lam, direction, segment, impl, as_valid_size(valid_size, x))
