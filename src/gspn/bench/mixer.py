"""``GSPNMixer`` beside softmax self-attention of the same width, on maps that grow until it takes too long."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn.analysis.cost import count_cost
from gspn.nn import GSPNMixer

from .accuracy_check import Figure, compare
from .comparison import Result
from .size_sweep import exponents as exponents
from .size_sweep import measure_growing

PER_CHANNEL, SHARED, ATTENTION = "GSPN", "GSPN, shared taps", "self-attention"
CANDIDATES = (PER_CHANNEL, SHARED, ATTENTION)
MODES = ("forward", "train")
SIDES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

CPU = torch.device("cpu")
_HEAD = 32
_CHECK_SIDES = (9, 12)


class MapAttention(nn.Module):
    """Softmax self-attention over the pixels of a map: qkv, scaled dot-product attention, projection, by timm.

    Args:
        dim: channels in and out.
        heads: a divisor of ``dim``.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> import torch
        >>> MapAttention(64, heads=2)(torch.randn(1, 64, 5, 7)).shape
        torch.Size([1, 64, 5, 7])
    """

    def __init__(
        self, dim: int, heads: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads=heads, qkv_bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``; with channels_last nothing is copied on the way in or out."""
        height, width = x.shape[-2:]
        tokens = self.attention(x.flatten(2).transpose(1, 2))  # [B, H W, dim]
        return tokens.transpose(1, 2).unflatten(2, (height, width))


@dataclass(frozen=True)
class MixerProblem:
    """What is compared: everything but the sizes of the maps."""

    dim: int = 96
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    mode: str = "forward"

    def module(self, name: str, seed: int = 0) -> nn.Module:
        """A candidate with seeded weights: the paper's mixer with taps for each channel, GSPN-2's, or attention."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if name == ATTENTION:
                module: nn.Module = MapAttention(self.dim, max(1, self.dim // _HEAD))
            elif name == SHARED:
                module = GSPNMixer(self.dim, proxy_dim=2, groups=1)
            else:
                module = GSPNMixer(self.dim)
        return module.to(device=self.device, dtype=self.dtype).to(memory_format=torch.channels_last)

    def map(self, height: int, width: int, seed: int = 0) -> Tensor:
        """A random map ``[B, dim, H, W]``, channels_last: what both kinds read without a copy."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.dim, height, width, generator=generator)
        return x.to(self.device, self.dtype, memory_format=torch.channels_last)

    def call(self, module: nn.Module, x: Tensor) -> Callable[[], object]:
        """One forward, or one forward and backward to the input and every parameter."""
        if self.mode == "forward":

            def forward() -> object:
                with torch.no_grad():
                    return module(x)

            return forward
        x = x.detach().requires_grad_()
        leaves = [x, *module.parameters()]
        grad = torch.ones_like(x)
        return lambda: torch.autograd.grad(module(x), leaves, grad)


def check_mixers(problem: MixerProblem, names: Sequence[str] = CANDIDATES) -> dict[str, list[Figure]]:
    """Hold each candidate's fast path against its specification on a small map, odd and not square.

    The specification of a GSPN mixer runs its scans with ``impl="reference"``, that of attention makes the whole
    matrix; in float64 it is the truth. An error of at most twice the specification's in the same dtype is accepted.

    Returns:
        For each candidate its figures; it may be timed only if all of them are ``ok``.
    """
    figures = {}
    x = problem.map(*_CHECK_SIDES, seed=1)
    for name in names:
        module = problem.module(name, seed=1)
        figures[name] = compare(
            _results(problem, module, x, plain=False),
            _results(problem, module, x, plain=True),
            _results(problem, copy.deepcopy(module).double(), x.double(), plain=True),
        )
    return figures


def _results(problem: MixerProblem, module: nn.Module, x: Tensor, *, plain: bool) -> dict[str, Tensor]:
    module = copy.deepcopy(module)
    if plain and isinstance(module, GSPNMixer):
        setattr(module.gspn, "impl", "reference")  # noqa: B010  (pyright takes a module's attributes for tensors)
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        y = module(x)
        results = {"y": y.detach()}
        if problem.mode == "train":
            (results["dx"],) = torch.autograd.grad(y, x, torch.ones_like(y))
    return results


def measure_mixers(
    problem: MixerProblem,
    names: Sequence[str] = CANDIDATES,
    sides: Sequence[int] = SIDES,
    *,
    baseline: str = ATTENTION,
    slowest_ms: float = 1000.0,
    repeats: int = 5,
    min_time: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Time the candidates on growing square maps, side by side at each size; :func:`check_mixers` comes before.

    A candidate drops out before the size at which a call would take longer than ``slowest_ms``, going by how its time
    grew last; so a run ends by itself. The defaults take about a minute on two CPU cores.

    Args:
        problem: what to compare.
        names: of :data:`CANDIDATES`.
        sides: H and W of the maps.
        baseline: the candidate that ratios are to.
        slowest_ms: the longest call to time.
        repeats: see :func:`~gspn.bench.timing.time_interleaved`.
        min_time: likewise.
        progress: called with (sizes done, sizes planned).

    Returns:
        A result for each size and candidate, in this order; of one that dropped out the first is there, with the
        reason.
    """
    modules = {name: problem.module(name) for name in names}

    def calls_at(side: int, running: Sequence[str]) -> dict[str, Callable[[], object]]:
        x = problem.map(side, side)
        return {name: problem.call(modules[name], x) for name in running}

    return measure_growing(
        "mixer",
        names,
        sides,
        calls_at,
        lambda name, side: count_cost(modules[name], (problem.dim, side, side)).macs,
        mode=problem.mode,
        batch=problem.batch,
        dtype=problem.dtype,
        device=problem.device,
        baseline=baseline,
        params={name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        slowest_ms=slowest_ms,
        repeats=repeats,
        min_time=min_time,
        progress=progress,
    )
