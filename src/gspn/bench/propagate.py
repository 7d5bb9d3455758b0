"""``gspn.propagate`` beside its composition and attention; alone or as a sub-layer with its projections.

Operations of propagate for an element and direction, multiply-adds as two: ``2 (3 G/C + 2) S`` for the maps; for the
taps three sigmoids of an exponential (13: a polynomial of degree six and two more) and a sum, 3 products, 2 sums and a
division, counted once for a group; 8 for the state and its gates; and ``2 S + 1`` an element for the skip. Taps for
each channel and S = 8: ``4 (80 + 42 + 6 + 8) + 17 = 561``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gspn
from gspn.analysis.cost import count_cost
from gspn.nn import GSPN2d
from gspn.ops.unfused import compose

from .accuracy_check import Figure, compare
from .comparison import Result
from .size_sweep import measure_growing
from .timing import Candidate, time_interleaved

PROPAGATE, COMPOSITION, SOFTMAX, LINEAR = "propagate", "composition", "softmax attention", "linear attention"
CANDIDATES = (PROPAGATE, COMPOSITION, SOFTMAX, LINEAR)
BLOCKS = ("GSPN", "GSPN, shared taps", SOFTMAX, LINEAR)
MODES = ("forward", "train")

CPU = torch.device("cpu")
_HEAD = 64


def operations(channels: int, states: int, groups: int, skip: bool = True) -> float:
    """Operations of propagate an element in four directions; see the module for the count.

    Example:
        >>> operations(640, 8, 640)
        561.0
    """
    share = groups / channels
    taps = share * (3 * (2 * states + 14) + 6)
    return 4 * (taps + 2 * 2 * states + 8) + (2 * states + 1 if skip else 0)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the kernel ``elu + 1``, not causal: ``[B, heads, N, d]`` in linear time and no N x N matrix."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = k.transpose(-1, -2) @ v  # [B, heads, d, d]
    norm = q @ k.sum(-2).unsqueeze(-1)  # [B, heads, N, 1]
    return q @ context / norm


def _heads(dim: int) -> int:
    return dim // _HEAD if dim % _HEAD == 0 else 1


@dataclass(frozen=True)
class PropagateProblem:
    """What is compared: everything but the sizes of the maps. Heads have 64 channels where that divides."""

    channels: int = 640
    batch: int = 1
    states: int = 8
    shared: bool = False
    segment: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    mode: str = "forward"
    memory_format: torch.memory_format = torch.contiguous_format
    impl: str = "auto"

    @property
    def groups(self) -> int:
        """Sets of taps."""
        return 1 if self.shared else self.channels

    def arguments(self, height: int, width: int, seed: int = 0) -> list[Tensor]:
        """``x, proxy, tap_proj, lam_proj, u_proj, skip_proj``, random."""
        generator = torch.Generator().manual_seed(seed)
        channels, states = self.channels, self.states
        shapes = (
            (self.batch, channels, height, width),
            (self.batch, states, height, width),
            (4, self.groups, 3, states),
            (4, channels, states),
            (4, channels, states),
            (4, channels, states),
        )
        tensors = [torch.randn(*shape, generator=generator).to(self.device, self.dtype) for shape in shapes]
        tensors[3:] = [t / states**0.5 for t in tensors[3:]]
        return [t.contiguous(memory_format=self.memory_format) for t in tensors[:2]] + tensors[2:]

    def function(self, name: str) -> Callable[..., Tensor]:
        """A candidate as a function of :meth:`arguments`; attention takes ``x`` as queries, keys and values."""
        if name == PROPAGATE:
            return lambda *a: gspn.propagate(*a, segment=self.segment, impl=self.impl)
        if name == COMPOSITION:

            def composed(*a: Tensor) -> Tensor:
                x, proxy, tap_proj, lam_proj, u_proj, skip_proj = a
                return compose(
                    x, proxy, tap_proj, lam_proj, u_proj, skip_proj.sum(0), gspn.DIRECTIONS, self.segment,
                    lambda *scan: torch.ops.gspn.line_scan(*scan, "auto"),
                )  # fmt: skip

            return composed
        attend = F.scaled_dot_product_attention if name == SOFTMAX else linear_attention

        def attention(tokens: Tensor, *_: Tensor) -> Tensor:
            return attend(tokens, tokens, tokens)

        return attention

    def tokens(self, height: int, width: int, seed: int = 0) -> Tensor:
        """``[B, heads, H W, C / heads]``, dense: what attention likes best."""
        heads = _heads(self.channels)
        shape = (self.batch, heads, height * width, self.channels // heads)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def call(self, name: str, height: int, width: int) -> Callable[[], object]:
        """One forward, or one forward and backward to every argument."""
        attends = name in (SOFTMAX, LINEAR)
        arguments = [self.tokens(height, width)] if attends else self.arguments(height, width)
        return timed(self.function(name), arguments, self.mode)

    def macs(self, name: str, side: int) -> int:
        """Multiply-adds of one map, counted as papers do."""
        pixels = side * side
        if name == SOFTMAX:
            return 2 * self.channels * pixels * pixels
        if name == LINEAR:
            return 2 * self.channels * pixels * self.channels // _heads(self.channels)
        per_pixel = 4 * (3 * self.groups + 2 * self.channels) * self.states + self.channels * (self.states + 16)
        return per_pixel * pixels


def timed(function: Callable[..., Tensor], arguments: Sequence[Tensor], mode: str) -> Callable[[], object]:
    """A call that runs ``function`` without gradients, or with its gradients to all arguments."""
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*arguments)

        return forward
    leaves = [t.detach().requires_grad_() for t in arguments]
    with torch.no_grad():
        grad = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def check_propagate(problem: PropagateProblem) -> list[Figure]:
    """Hold the implementation against the specification on a small map, odd and not square, every gradient included.

    Returns:
        A figure for each result; it may be timed only if all of them are ``ok``.
    """
    arguments = problem.arguments(9, 13, seed=1)

    def results(tensors: Sequence[Tensor], impl: str) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = gspn.propagate(*leaves, segment=problem.segment, impl=impl)  # type: ignore[arg-type]
        names = ("dx", "dproxy", "dtap_proj", "dlam_proj", "du_proj", "dskip_proj")
        return {"y": y.detach()} | dict(zip(names, torch.autograd.grad(y.sum(), leaves), strict=True))

    doubles = [t.double() for t in arguments]
    return compare(results(arguments, problem.impl), results(arguments, "reference"), results(doubles, "reference"))


def measure_propagate(
    problem: PropagateProblem,
    names: Sequence[str] = CANDIDATES,
    sides: Sequence[int] = (64, 128),
    *,
    slowest_ms: float = 20000.0,
    repeats: int = 5,
    min_time: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Time the operator and its baselines at each size in turns; :func:`check_propagate` comes before."""
    return measure_growing(
        "propagate",
        names,
        sides,
        lambda side, running: {name: problem.call(name, side, side) for name in running},
        problem.macs,
        mode=problem.mode,
        batch=problem.batch,
        dtype=problem.dtype,
        device=problem.device,
        baseline=PROPAGATE,
        slowest_ms=slowest_ms,
        repeats=repeats,
        min_time=min_time,
        progress=progress,
    )


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Operations a second of a square matrix product, here and now: what arithmetic is held against."""
    a = torch.randn(size, size).to(device, dtype)
    found = time_interleaved([Candidate("matmul", lambda: a @ a)], device, repeats=20, min_time=0.3)
    return 2 * size**3 / (found["matmul"].p50 / 1e3)


# --- Sub-layers -------------------------------------------------------------------------------------------------------


class GSPNSubLayer(nn.Module):
    """A 1x1 projection in, :class:`gspn.nn.GSPN2d`, and one out: what stands in the place of attention's sub-layer."""

    def __init__(self, dim: int, states: int, shared: bool) -> None:
        super().__init__()
        self.in_proj = nn.Conv2d(dim, dim, 1, bias=False)
        self.gspn = GSPN2d(dim, proxy_dim=states, groups=1 if shared else None)
        self.out_proj = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``."""
        return self.out_proj(self.gspn(self.in_proj(x)))


class AttentionSubLayer(nn.Module):
    """Queries, keys and values, attention with heads of 64, and a projection out, over the pixels of a map."""

    def __init__(self, dim: int, linear: bool) -> None:
        super().__init__()
        self.heads = _heads(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.attend = linear_attention if linear else F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, dim, H, W]``; with channels_last nothing is copied on the way in or out."""
        batch, dim, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, dim]
        q, k, v = self.qkv(tokens).view(batch, -1, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = self.attend(q, k, v).transpose(1, 2).reshape(batch, -1, dim)
        return self.out_proj(mixed).transpose(1, 2).unflatten(2, (height, width))


def block(problem: PropagateProblem, name: str) -> nn.Module:
    """One of :data:`BLOCKS` with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in (SOFTMAX, LINEAR):
            module: nn.Module = AttentionSubLayer(problem.channels, name == LINEAR)
        else:
            module = GSPNSubLayer(problem.channels, problem.states, name != BLOCKS[0])
    return module.to(problem.device, problem.dtype).to(memory_format=torch.channels_last)


def measure_blocks(
    problem: PropagateProblem,
    names: Sequence[str] = BLOCKS,
    sides: Sequence[int] = (16, 32, 64, 128),
    *,
    slowest_ms: float = 20000.0,
    repeats: int = 5,
    min_time: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Time whole sub-layers with their projections at each size in turns."""
    modules = {name: block(problem, name) for name in names}

    def calls_at(side: int, running: Sequence[str]) -> dict[str, Callable[[], object]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(problem.batch, problem.channels, side, side, generator=generator).to(
            problem.device, problem.dtype
        )
        x = x.contiguous(memory_format=torch.channels_last)
        train = problem.mode == "train"
        return {name: _trained(modules[name], x) if train else timed(modules[name], [x], "forward") for name in running}

    return measure_growing(
        "block",
        names,
        sides,
        calls_at,
        lambda name, side: count_cost(modules[name], (problem.channels, side, side)).macs,
        mode=problem.mode,
        batch=problem.batch,
        dtype=problem.dtype,
        device=problem.device,
        baseline=names[0],
        params={name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        slowest_ms=slowest_ms,
        repeats=repeats,
        min_time=min_time,
        progress=progress,
    )


def _trained(module: nn.Module, x: Tensor) -> Callable[[], object]:
    x = x.detach().requires_grad_()
    leaves, grad = [x, *module.parameters()], torch.ones_like(x)
    return lambda: torch.autograd.grad(module(x), leaves, grad)
