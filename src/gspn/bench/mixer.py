"""Token mixers with their projections on growing maps: GSPN beside softmax and linear attention of the same width."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn.analysis.cost import count_cost
from gspn.nn import GSPN2d, GSPNMixer

from .accuracy_check import Accuracy, compare
from .attention import LINEAR_ATTENTION, SELF_ATTENTION, MapAttention
from .size_sweep import SizeSweep, timed_call

PER_CHANNEL, SHARED = "GSPN", "GSPN, shared taps"
SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

_CHECK_MAP = (9, 12)


class BareMixer(nn.Module):
    """A 1x1 projection in, :class:`gspn.nn.GSPN2d`, and one out: the counterpart of attention's four projections.

    Args:
        dim: channels in and out.
        **propagation: options of :class:`gspn.nn.GSPN2d`.
    """

    def __init__(self, dim: int, **propagation: Any) -> None:
        super().__init__()
        self.in_proj = nn.Conv2d(dim, dim, 1, bias=False)
        self.gspn = GSPN2d(dim, **propagation)
        self.out_proj = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``."""
        return self.out_proj(self.gspn(self.in_proj(x)))


@dataclass(frozen=True, kw_only=True)
class MixerSweep(SizeSweep):
    """GSPN with taps for each channel and with shared taps (GSPN-2), softmax attention and linear attention.

    Args:
        channels: the width of every mixer.
        proxy_dim: the channels of GSPN's proxy; None for 8, and 2 with shared taps.
        bare: whether GSPN is :class:`BareMixer` instead of :class:`gspn.nn.GSPNMixer`, which also has a wider map,
            a depthwise convolution and norms.
    """

    benchmark: ClassVar[str] = "mixer"
    candidates: ClassVar[tuple[str, ...]] = (PER_CHANNEL, SHARED, SELF_ATTENTION, LINEAR_ATTENTION)
    baseline: ClassVar[str] = SELF_ATTENTION

    channels: int = 96
    proxy_dim: int | None = None
    bare: bool = False
    _modules: dict[str, nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)

    def module(self, candidate: str) -> nn.Module:
        """The module of a candidate, with seeded weights."""
        if candidate not in self._modules:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                if candidate in (SELF_ATTENTION, LINEAR_ATTENTION):
                    module: nn.Module = MapAttention(self.channels, linear=candidate == LINEAR_ATTENTION)
                else:
                    shared = candidate == SHARED
                    proxy_dim = self.proxy_dim or (2 if shared and not self.bare else 8)
                    kind = BareMixer if self.bare else GSPNMixer
                    module = kind(self.channels, proxy_dim=proxy_dim, groups=1 if shared else None)
            self._modules[candidate] = module.to(device=self.device, dtype=self.dtype).to(
                memory_format=torch.channels_last
            )
        return self._modules[candidate]

    def map(self, height: int, width: int, seed: int = 0) -> Tensor:
        """A random map ``[B, channels, H, W]``, channels_last: no candidate copies it."""
        x = torch.randn(self.batch, self.channels, height, width, generator=torch.Generator().manual_seed(seed))
        return x.to(self.device, self.dtype, memory_format=torch.channels_last)

    def calls(self, candidates: Sequence[str], size: int) -> dict[str, Callable[[], object]]:
        """One forward, or one forward and backward to the map and every parameter."""
        x, train = self.map(size, size), self.mode == "train"
        modules = {name: self.module(name) for name in candidates}
        return {
            name: timed_call(module, [x], train=train, parameters=list(module.parameters()))
            for name, module in modules.items()
        }

    def macs(self, candidate: str, size: int) -> int | None:
        """Multiply-adds of one map."""
        return count_cost(self.module(candidate), (self.channels, size, size)).macs

    def params(self, candidate: str) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.module(candidate).parameters())

    def check(self) -> dict[str, list[Accuracy]]:
        """Compare each candidate with its specification: scans with ``impl="reference"``, attention as a matrix."""
        x = self.map(*_CHECK_MAP, seed=1)
        accuracies = {}
        for name in self.candidates:
            module = self.module(name)
            exact = self._results(copy.deepcopy(module).double(), x.double(), plain=True)
            accuracies[name] = compare(
                self._results(module, x, plain=False), self._results(module, x, plain=True), exact
            )  # fmt: skip
        return accuracies

    def _results(self, module: nn.Module, x: Tensor, *, plain: bool) -> dict[str, Tensor]:
        module = copy.deepcopy(module)
        if plain and hasattr(module, "gspn"):
            setattr(module.gspn, "impl", "reference")  # noqa: B010  (pyright takes a module's attributes for tensors)
        x = x.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            y = module(x)
            results = {"y": y.detach()}
            if self.mode == "train":
                (results["dx"],) = torch.autograd.grad(y, x, torch.ones_like(y))
        return results
