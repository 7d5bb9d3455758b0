"""``propagate`` as the composition that defines it, and its gradients, map by map."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..stochastic_taps import stochastic_taps
from ..unfused import compose, project, project_taps
from .images import each_image, put_together
from .line_scan import line_scan, line_scan_backward


def propagate(
    x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
    directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The composition of ``stochastic_taps`` and ``line_scan``; see :func:`gspn.propagate`."""
    if valid_size is not None:
        how: Any = (tap_proj, lam_proj, u_proj, skip_proj, directions, segment)
        return put_together([propagate(*own, *how) for own in each_image(valid_size, x, proxy)], x)
    y = compose(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment, line_scan)
    return torch.empty_like(x).copy_(y)


def propagate_backward(
    grad: Tensor, x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
    skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of the composition, each map's in turn; with ``w = stochastic_taps(a)`` those of the logits are

    ``da_k = sigmoid(-a_k) w_k (dw_k - sum_j w_j dw_j)``,

    and a map ``P p`` gives ``P^T d`` to the proxy and the sum over pixels of ``d p^T`` to its projection.
    """
    if valid_size is not None:
        how: Any = (tap_proj, lam_proj, u_proj, skip_proj, directions, segment)
        own = [propagate_backward(*maps, *how) for maps in each_image(valid_size, grad, x, proxy)]
        dx, dproxy, *of_projections = (cast("list[Tensor]", [grads[i] for grads in own]) for i in range(6))
        zeros = (None if p is None else p.new_zeros(p.shape) for p in (tap_proj, lam_proj, u_proj, skip_proj))
        sums = (None if none is None else sum(grads, none) for grads, none in zip(of_projections, zeros, strict=True))
        return put_together(dx, x), put_together(dproxy, proxy), *sums  # pyright: ignore[reportReturnType]
    dtype = x.dtype
    if dtype.itemsize == 1:  # PyTorch stores 8-bit floats and does not compute with them
        grad, x, proxy = (t.to(torch.float32) for t in (grad, x, proxy))
        dx, dproxy, *rest = propagate_backward(
            grad, x, proxy, tap_proj, lam_proj, u_proj, skip_proj, directions, segment
        )
        return dx.to(dtype), dproxy.to(dtype), *rest  # pyright: ignore[reportReturnType]
    dx, dproxy = torch.zeros_like(x), torch.zeros_like(proxy)
    dtap, dlam, du = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (tap_proj, lam_proj, u_proj))

    def add_to_proxy(map_grad: Tensor, weight: Tensor) -> Tensor:
        """Adds ``P^T d`` to the proxy's gradient and returns that of ``P``."""
        dproxy.add_(torch.einsum("bchw,cs->bshw", map_grad, weight))
        return torch.einsum("bchw,bshw->cs", map_grad, proxy)

    dskip = None
    if skip_proj is not None:
        weight = skip_proj.to(dtype)
        dx += project(proxy, weight) * grad
        dskip = add_to_proxy(x * grad, weight).to(skip_proj.dtype)
    for d, direction in enumerate(directions):
        tap_weight, lam_weight, u_weight = (p[d].to(dtype) for p in (tap_proj, lam_proj, u_proj))
        logits = project_taps(proxy, tap_weight)
        taps = stochastic_taps(logits, direction=direction)  # type: ignore[arg-type]
        lam = project(proxy, lam_weight)
        h = line_scan(x, taps, lam, direction, segment)
        dx_d, dtaps, dlam_map = line_scan_backward(
            grad * project(proxy, u_weight), h, x, taps, lam, direction, segment, True, True
        )
        dx += dx_d
        du[d] = add_to_proxy(grad * h, u_weight)
        dlam[d] = add_to_proxy(cast("Tensor", dlam_map), lam_weight)
        dtaps = cast("Tensor", dtaps)
        mean = (taps * dtaps).sum(2, keepdim=True)
        dlogits = torch.sigmoid(-logits) * taps * (dtaps - mean)  # [B, G, 3, H, W]
        dtap[d] = add_to_proxy(dlogits.flatten(1, 2), tap_weight.flatten(0, 1)).view_as(tap_weight)
    return dx, dproxy, dtap, dlam, du, dskip
