"""Parameters and multiply-adds of a model, counted and in closed form."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn import GSPN2d


@dataclass(frozen=True)
class Cost:
    """The size of a model and the cost of its forward pass."""

    params: int
    """Number of elements of all parameters; shared parameters count once."""
    macs: int
    """Multiply-adds of one forward pass."""
    by_module: Mapping[str, int]
    """Multiply-adds of each module that has any, children included, by the names of ``named_modules``."""


def count_cost(model: nn.Module, input_size: Sequence[int] | None = None) -> Cost:
    """Count a model's parameters and the multiply-adds of its forward pass on one image.

    ``torch.utils.flop_counter`` counts convolutions, matrix products, attention and scans; a scan has three taps and a
    gate for each element of the state. Elementwise products (gates, norms, activations) are left out, as in papers.

    The forward pass runs on a copy on the ``meta`` device: nothing is computed, and images of any size need no memory.

    Args:
        model: the model, on any device; it is counted in evaluation mode and not changed.
        input_size: (channels, height, width) of one image; None for the size of the model's ``pretrained_cfg``.

    Raises:
        ValueError: no size was passed, and the model has none.

    Example:
        >>> import timm, gspn.models
        >>> from gspn.analysis import count_cost
        >>> cost = count_cost(timm.create_model("gspn_tiny"))
        >>> f"{cost.params / 1e6:.1f} M parameters, {cost.macs / 1e9:.1f} GMACs"
        '31.5 M parameters, 5.2 GMACs'
        >>> f"{cost.by_module['stages.2'] / cost.macs:.0%} in the third stage"
        '49% in the third stage'
    """
    # Imported here, because it imports triton where that is installed.
    from torch.utils.flop_counter import FlopCounterMode

    from ..ops import flop_counts as _formulas  # noqa: F401  (registers the formulas of the scans)

    if input_size is None:
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        input_size = cfg.get("input_size")
        if input_size is None:
            raise ValueError(f"{type(model).__name__} has no input size; pass input_size=(channels, height, width).")
    if len(input_size) != 3:
        raise ValueError(f"{input_size=}: pass (channels, height, width).")
    on_meta = copy.deepcopy(model).to("meta").eval()
    dtype = next((p.dtype for p in on_meta.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, *input_size, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(image)
    root = type(on_meta).__name__
    by_module = {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name.startswith(root)
    }
    by_module = {name: macs for name, macs in by_module.items() if name and macs}
    return Cost(
        params=sum(p.numel() for p in model.parameters()), macs=counter.get_total_flops() // 2, by_module=by_module
    )


def gspn2d_macs(module: GSPN2d, height: int, width: int) -> int:
    """The multiply-adds of :class:`gspn.nn.GSPN2d` on one map, in closed form; :func:`count_cost` counts the same.

    With C channels, a proxy of S, G sets of taps and D directions, for each pixel::

        C S  +  D (3 G S  +  2 C S  +  4 C)  +  C S        the proxy, D times taps, gates and scan, and the skip

    The cost is linear in the number of pixels and does not depend on the segment. With ``alignment="official"`` the
    skip is projected for each direction.

    Example:
        >>> from gspn.analysis import gspn2d_macs
        >>> from ..nn import GSPN2d
        >>> gspn2d_macs(GSPN2d(48, proxy_dim=2, groups=1), 56, 56)
        5494272
    """
    options: Any = module
    channels, proxy, groups, directions = options.dim, options.proxy_dim, options.groups, len(options.directions)
    skips = 0 if options.skip_proj is None else directions if options.alignment == "official" else 1
    pixel = channels * proxy + directions * (3 * groups * proxy + 2 * channels * proxy + 4 * channels)
    return (pixel + skips * channels * proxy) * height * width
