"""``gspn.propagate`` on growing maps, beside its unfused form and attention.

The operations of propagate for an element and direction, with a multiply-add counted as two: ``2 (3 G/C + 2) S`` for
the maps; for the taps three sigmoids, each an exponential (13: a polynomial of degree six and two more) and a sum, then
3 products, 2 sums and a division, once for a group; 8 for the state and its gates; and ``2 S + 1`` for an element's
skip. With taps for each channel and S = 8 this is ``4 (80 + 42 + 6 + 8) + 17 = 561``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import gspn
from gspn.ops.unfused import compose

from .accuracy_check import Accuracy, compare
from .attention import LINEAR_ATTENTION, SELF_ATTENTION, head_count, linear_attention
from .size_sweep import SizeSweep, timed_call
from .timing import Candidate, time_interleaved

PROPAGATE, UNFUSED = "propagate", "unfused"

_CHECK_MAP = (9, 13)


def operations(channels: int, proxy_dim: int, groups: int) -> float:
    """Operations of propagate for an element, in four directions with the skip; the module's docstring counts them.

    Example:
        >>> operations(640, 8, 640)
        561.0
    """
    taps = groups / channels * (3 * (2 * proxy_dim + 14) + 6)
    return 4 * (taps + 2 * 2 * proxy_dim + 8) + 2 * proxy_dim + 1


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Operations a second of a square matrix product on this machine, now."""
    a = torch.randn(size, size).to(device, dtype)
    timings = time_interleaved([Candidate("matmul", lambda: a @ a)], device, repeats=20, min_time=0.3)
    return 2 * size**3 / (timings["matmul"].p50 / 1e3)


@dataclass(frozen=True, kw_only=True)
class PropagateSweep(SizeSweep):
    """The operator, its unfused form with every map in memory, softmax attention and linear attention.

    Attention gets its queries, keys and values ready, in heads of 64 channels where that divides.

    Args:
        channels: the channels of x.
        proxy_dim: the channels of the proxy.
        shared: whether all channels share one set of taps.
        segment: lines after which scans restart; None for global scans.
        memory_format: the layout of x and the proxy.
        impl: the implementation of :func:`gspn.propagate`.
    """

    benchmark: ClassVar[str] = "propagate"
    candidates: ClassVar[tuple[str, ...]] = (PROPAGATE, UNFUSED, SELF_ATTENTION, LINEAR_ATTENTION)
    baseline: ClassVar[str] = PROPAGATE

    channels: int = 640
    proxy_dim: int = 8
    shared: bool = False
    segment: int | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    impl: str = "auto"

    @property
    def groups(self) -> int:
        """Sets of taps."""
        return 1 if self.shared else self.channels

    def arguments(self, height: int, width: int, seed: int = 0) -> list[Tensor]:
        """``x, proxy, tap_proj, lam_proj, u_proj, skip_proj``, random."""
        generator = torch.Generator().manual_seed(seed)
        channels, proxy_dim = self.channels, self.proxy_dim
        shapes = (
            (self.batch, channels, height, width),
            (self.batch, proxy_dim, height, width),
            (4, self.groups, 3, proxy_dim),
            (4, channels, proxy_dim),
            (4, channels, proxy_dim),
            (4, channels, proxy_dim),
        )
        tensors = [torch.randn(*shape, generator=generator).to(self.device, self.dtype) for shape in shapes]
        tensors[3:] = [t / proxy_dim**0.5 for t in tensors[3:]]
        return [t.contiguous(memory_format=self.memory_format) for t in tensors[:2]] + tensors[2:]

    def function(self, candidate: str) -> Callable[..., Tensor]:
        """A candidate as a function of :meth:`arguments`; attention takes ``x`` as queries, keys and values."""
        if candidate == PROPAGATE:
            return lambda *a: gspn.propagate(*a, segment=self.segment, impl=self.impl)
        if candidate == UNFUSED:

            def unfused(
                x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor
            ) -> Tensor:
                return compose(
                    x, proxy, tap_proj, lam_proj, u_proj, skip_proj.sum(0), gspn.DIRECTIONS, self.segment,
                    lambda *scan: torch.ops.gspn.line_scan(*scan, "auto"),
                )  # fmt: skip

            return unfused
        attend = F.scaled_dot_product_attention if candidate == SELF_ATTENTION else linear_attention
        return lambda tokens: attend(tokens, tokens, tokens)

    def tokens(self, height: int, width: int, seed: int = 0) -> Tensor:
        """``[B, heads, H W, C / heads]``, dense: the layout that attention is fastest with."""
        heads = head_count(self.channels)
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, heads, height * width, self.channels // heads)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def calls(self, candidates: Sequence[str], size: int) -> dict[str, Callable[[], object]]:
        """One forward, or one forward and backward to every argument."""
        return {
            name: timed_call(
                self.function(name),
                [self.tokens(size, size)] if name in (SELF_ATTENTION, LINEAR_ATTENTION) else self.arguments(size, size),
                train=self.mode == "train",
            )
            for name in candidates
        }

    def macs(self, candidate: str, size: int) -> int:
        """Multiply-adds of one map, counted as papers do."""
        channels, pixels = self.channels, size * size
        if candidate == SELF_ATTENTION:
            return 2 * channels * pixels * pixels
        if candidate == LINEAR_ATTENTION:
            return 2 * channels * pixels * channels // head_count(channels)
        per_pixel = 4 * (3 * self.groups + 2 * channels) * self.proxy_dim + channels * (self.proxy_dim + 16)
        return per_pixel * pixels

    def check(self) -> dict[str, list[Accuracy]]:
        """Compare the implementation with the specification: the result and every gradient."""
        arguments = self.arguments(*_CHECK_MAP, seed=1)

        def results(tensors: Sequence[Tensor], impl: str) -> dict[str, Tensor]:
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = gspn.propagate(*leaves, segment=self.segment, impl=impl)  # type: ignore[arg-type]
            names = ("dx", "dproxy", "dtap_proj", "dlam_proj", "du_proj", "dskip_proj")
            return {"y": y.detach()} | dict(zip(names, torch.autograd.grad(y.sum(), leaves), strict=True))

        exact = results([t.double() for t in arguments], "reference")
        return {PROPAGATE: compare(results(arguments, self.impl), results(arguments, "reference"), exact)}
