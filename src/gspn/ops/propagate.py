"""``gspn.propagate``: everything after the proxy, in one operator. How it is computed is the backends' matter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .directions import DIRECTIONS, Direction
from .implementations import check_impl
from .torch_library import apply_propagate, composed_propagate
from .valid_size import Sizes, as_valid_size
from .validation import (
    autocast,
    check_directions,
    check_is_tensor,
    check_propagate,
    check_scannable,
    check_segment,
    state_dtype,
)  # fmt: skip


def propagate(
    x: Tensor,
    proxy: Tensor,
    tap_proj: Tensor,
    lam_proj: Tensor,
    u_proj: Tensor,
    skip_proj: Tensor | None = None,
    merge: Tensor | None = None,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    segment: int | None = None,
    valid_size: Sizes | None = None,
    impl: str = "auto",
) -> Tensor:
    """Propagate over the whole image: scans in four directions with maps predicted from a proxy, gated and merged.

    With p the proxy and for each direction d the linear maps ``T_d`` (``tap_proj``), ``Λ_d`` (``lam_proj``), ``U_d``
    (``u_proj``) and ``S_d`` (``skip_proj``) of it, pixel by pixel::

        y = Σ_d m_d ( U_d p · line_scan_d(x, stochastic_taps(T_d p), Λ_d p) + S_d p · x )

    This is the operator of GSPN (arXiv 2501.12381, section 3 and figure 3), with the input-dependent skip of the
    authors' networks. Written out, it needs up to 24 maps of the size of ``x``. The kernels compute them line by line
    from the proxy and never write them, forward or backward: cost and memory are those of ``x``, ``proxy`` and ``y``.

    The state accumulates in float32, or float64 for float64, and so do the maps in the kernels. Nothing is kept for the
    backward but the arguments; maps and states are computed again. Results are the same on every run.

    Under autocast to bfloat16, ``x`` and ``proxy`` are converted to bfloat16; under autocast to float16, whose range a
    long scan leaves, to float32. The projections stay as they are. First derivatives run in the kernels; a second
    derivative, or one in forward mode, goes through the composition of :func:`gspn.stochastic_taps` and
    :func:`gspn.line_scan`, as everything does with ``impl="reference"``.

    Args:
        x: ``[B, C, H, W]``, float64, float32, bfloat16 or float16, and 8-bit floats with ``impl="reference"``; any
            strides, any H and W including 1, B may be 0.
        proxy: ``[B, S, H, W]``, of x's dtype and device, S at least 1; usually 2 to 16.
        tap_proj: ``[D, G, 3, S]``, from the proxy to the logits of the taps at cross offsets -1, 0, +1; ``G`` divides
            ``C``, and ``C / G`` consecutive channels share taps (``G = C``: GSPN; ``G = 1``: GSPN-2). Projections and
            merge are of x's dtype, or float32 where that is bfloat16 or float16.
        lam_proj: ``[D, C, S]``, from the proxy to the input gate.
        u_proj: ``[D, C, S]``, from the proxy to the output gate.
        skip_proj: ``[D, C, S]``, from the proxy to the gate of the skip; None for no skip.
        merge: ``[D]``, a weight for each direction; None for ones.
        directions: the D directions of the projections' first axis, each at most once.
        segment: number of lines, at least 1, after which every scan restarts; None for global scans, which connect
            every pixel with every other.
        valid_size: the height and width of each image, for images of several sizes in one batch: an int64 tensor
            ``[B, 2]`` on any device, or a list of pairs, each from 0 to the map's. Each image lies at the top left of
            its map and is computed as if it were alone: taps sum to one over its own neighbours, scans begin and end,
            and segments are counted, at its own border. What stands in the padding has no influence; results and
            gradients there are 0, and the projections' gradients are sums over the images' pixels. None for images
            that fill their maps.
        impl: ``"auto"``, the fastest that runs for this device and dtype; or one that :func:`gspn.available_impls`
            lists, which raises if it cannot run.

    Returns:
        ``y``, of the shape, dtype and device of ``x``, and of its memory layout where ``x`` is dense.

    Raises:
        TypeError: an argument is not a tensor, not floating point, or the dtypes differ; ``segment`` or ``valid_size``
            are not integers.
        ValueError: a shape, device, direction, segment, size or impl does not fit.
        NotImplementedError: the ``impl`` named cannot run on this device or dtype.
        ImportError: the ``impl`` named needs a package that is not installed.

    Example:
        With a proxy of ones and tap logits of zero every line is an average of the one before plus the input, and the
        four directions add up:

        >>> import torch, gspn
        >>> x, proxy = torch.ones(1, 2, 3, 3), torch.ones(1, 1, 3, 3)
        >>> tap_proj, gate = torch.zeros(4, 2, 3, 1), torch.ones(4, 2, 1)
        >>> gspn.propagate(x, proxy, tap_proj, gate, gate)[0, 0]
        tensor([[8., 8., 8.],
                [8., 8., 8.],
                [8., 8., 8.]])
        >>> gspn.propagate(x, proxy, tap_proj[:1], gate[:1], gate[:1], directions=["down"])[0, 0, :, 0]
        tensor([1., 2., 3.])
        >>> gspn.propagate(x, proxy, tap_proj, gate, gate, valid_size=[(2, 2)])[0, 0]
        tensor([[6., 6., 0.],
                [6., 6., 0.],
                [0., 0., 0.]])
    """
    check_impl(impl)
    check_segment(segment)
    if directions is not DIRECTIONS:
        check_directions(directions)
    check_is_tensor("x", x)
    check_is_tensor("proxy", proxy)
    x, proxy = autocast(x, proxy)
    check_scannable("x", x)
    # Projections may have the state's dtype, which loses nothing.
    wide = state_dtype(x.dtype)

    def widened(name: str, projection: Tensor) -> Tensor:
        check_is_tensor(name, projection)
        return projection.to(wide) if projection.dtype == x.dtype else projection

    tap_proj, lam_proj, u_proj = widened("tap_proj", tap_proj), widened("lam_proj", lam_proj), widened("u_proj", u_proj)
    skip_proj = None if skip_proj is None else widened("skip_proj", skip_proj)  # [D, C, S]
    merge = None if merge is None else widened("merge", merge)
    if skip_proj is not None or merge is not None:  # products and sums below would broadcast, or hide a shape
        projections = (tap_proj, lam_proj, u_proj, skip_proj)
        check_propagate(x, proxy, *projections, len(directions), segment, False, merge=merge, skip_axes=3)
    # The merge is folded into the projections, and the skips of all directions are one: both sums are linear.
    if merge is not None:
        weight = merge.view(-1, 1, 1)
        u_proj = u_proj * weight
        skip_proj = None if skip_proj is None else skip_proj * weight
    skip_proj = None if skip_proj is None else skip_proj.sum(0)  # [C, S]
    call = composed_propagate if impl == "reference" else apply_propagate
    sizes = as_valid_size(valid_size, x)
    return call(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, ",".join(directions), segment, impl, sizes)
