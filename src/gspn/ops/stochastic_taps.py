"""``gspn.stochastic_taps``: logits to taps with which every scan is stable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .directions import Direction, scan_axes
from .valid_size import Sizes, as_valid_size, within


def _memory_order(tensor: Tensor) -> list[int]:
    """The axes, those of the largest strides first."""
    # Symbolic strides cannot be sorted, and a compiler lays out what it fuses itself.
    if torch.compiler.is_compiling() or tensor.is_contiguous():
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def stochastic_taps(logits: Tensor, *, direction: Direction, valid_size: Sizes | None = None) -> Tensor:
    """Turn logits into taps that are positive and sum to one over the neighbours that exist.

    With a the logits and σ the sigmoid, at each pixel::

        taps[k] = σ(a[k]) / Σ_m σ(a[m])        over the neighbours m that exist

    and 0 for a neighbour outside the image: the first tap on the first position of a line, the last tap on the last.
    Every step of the scan is then an average, which is the paper's Stability-Context Condition (GSPN, arXiv
    2501.12381, section 3.2). Which positions are first and last depends on the direction alone: columns for ``"down"``
    and ``"up"``, rows for ``"right"`` and ``"left"``.

    Computed as a softmax of log-sigmoids, in float32 at least: logits of any size give finite taps and gradients. At
    infinite logits both are the limits: ``-inf`` weighs nothing beside a finite logit, ``+inf`` is a sigmoid of one,
    and where every neighbour that exists has ``-inf`` they share equally, as equal logits do on the way there. A NaN
    makes all taps of its pixel NaN, unless its neighbour does not exist.

    Args:
        logits: ``[B, G, 3, H, W]``, any floating-point dtype and strides.
        direction: ``"down"``, ``"up"``, ``"right"`` or ``"left"``: the direction of the scan the taps are for.
        valid_size: as for :func:`gspn.line_scan`: neighbours beyond an image's own border do not exist, and the taps in
            the padding are 0.

    Returns:
        The taps, ``[B, G, 3, H, W]`` in the dtype and, where ``logits`` is dense, the memory layout of ``logits``.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor.
        ValueError: the shape or the direction does not fit.

    Example:
        >>> import torch, gspn
        >>> taps = gspn.stochastic_taps(torch.zeros(1, 1, 3, 1, 4), direction="down")
        >>> taps[0, 0, :, 0].T
        tensor([[0.0000, 0.5000, 0.5000],
                [0.3333, 0.3333, 0.3333],
                [0.3333, 0.3333, 0.3333],
                [0.5000, 0.5000, 0.0000]])
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}; pass a torch.Tensor.")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{logits.dtype=}: taps need floating point, so convert with .float().")
    if logits.dim() != 5 or logits.shape[2] != 3:
        raise ValueError(f"{logits.shape=}: logits must be [B, G, 3, H, W], three for each pixel of each group.")
    cross = scan_axes(direction).cross
    valid_size = as_valid_size(valid_size, logits)
    logits = within(logits, valid_size)
    size = logits.shape[cross]
    position = torch.arange(size, device=logits.device)
    offset = torch.arange(-1, 2, device=logits.device)
    neighbour = position + offset.unsqueeze(-1)  # [3, n]
    missing = (neighbour < 0) | (neighbour >= size)
    if valid_size is not None:
        # The last position of an image lacks its neighbour too. In the padding there are taps, which are cut off below.
        last = valid_size[:, 0 if cross == -2 else 1, None] - 1 == position  # [B, n]
        missing = missing | (last.unsqueeze(1) & (offset == 1).unsqueeze(-1))  # [B, 3, n]
    missing = missing.unsqueeze(-2) if cross == -1 else missing.unsqueeze(-1)  # [.., 3, 1, W] or [.., 3, H, 1]

    # In memory order throughout, since PyTorch's softmax and masked_fill would transpose taps of a channels_last map.
    order = _memory_order(logits)
    inverse = [order.index(axis) for axis in range(5)]
    missing = (missing[None, None] if valid_size is None else missing.unsqueeze(1)).permute(order)
    ordered = logits.permute(order)

    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Masked before and after: a NaN where there is no neighbour must reach neither the taps nor the gradient. On a CPU
    # where() with a broadcast condition is twice as fast as masked_fill.
    finite = torch.where(missing, 0, ordered).to(acc)
    # The lowest number in the place of -inf, whose softmax is NaN. Detached, so that gradients pass as at any logit.
    values = finite.detach()
    values.copy_(values.clamp(min=torch.finfo(acc).min))
    log_gate = torch.where(missing, -torch.inf, logsigmoid(finite))
    return within(log_gate.softmax(dim=order.index(2)).to(logits.dtype).permute(inverse), valid_size)
