"""Recurrences that were tried beside the paper's and are not in the library, and what one layer learns with each.

    python benchmarks/scan_forms.py [--output CSV]

With the taps w, which sum to one, the input gate lam and the state h of the line before, the paper's scan is
``h = lam x + w h``. A state is then a sum of as many averages as lines were scanned. Each form here bounds it in
another way and is made of the library's operators, so that every derivative is theirs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import typer
from common import Csv, print_table, spread, write_csv
from torch import Tensor, nn

from gspn import line_scan, propagate
from gspn.nn import GSPN2d
from gspn.ops.directions import scan_axes
from gspn.ops.unfused import project, project_taps


class Average(GSPN2d):
    """``h_i / i``: the state over the number i of lines scanned, which is a mean of the averages.

    The number of lines divides the output gate, which is linear in the proxy: so the scan is that of
    :func:`gspn.propagate` with a second proxy ``p / i`` beside p, for the output gate alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        proxy = self.proxy(x)  # [B, S, H, W]
        u_proj = self.u_proj * self.merge[:, None, None]  # [D, C, S]
        y = _skip(self, x, proxy)
        for d, direction in enumerate(self.directions):
            axes = scan_axes(direction)
            scanned = torch.arange(1, x.shape[axes.line] + 1, device=x.device, dtype=x.dtype)
            scanned = scanned.flip(0) if axes.reverse else scanned
            both = torch.cat([proxy, proxy / (scanned[:, None] if axes.line == -2 else scanned)], dim=1)
            first, second = (0, self.proxy_dim), (self.proxy_dim, 0)  # the half of the proxy that a map reads
            maps = [F.pad(one[d : d + 1], first) for one in (self.tap_proj, self.lam_proj)]
            u = F.pad(u_proj[d : d + 1], second)
            y = y + propagate(x, both, *maps, u, directions=[direction], impl=self.impl)
        return y


class Forget(GSPN2d):
    """``h = lam x + f (w h)`` with a forget gate ``f = sigmoid(F p + b)`` for each pixel and group of channels.

    The state is at most ``max |lam x| / (1 - max f)``. The bias b starts where groups remember 2 to 32 lines, evenly
    spread on a logarithmic scale; without it all would start at two lines, which is no more than a convolution sees.
    """

    convex = False

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        count, bound = len(self.directions), 1 / math.sqrt(self.proxy_dim)
        memory = torch.logspace(1, 5, self.groups, base=2)
        self.forget_proj = nn.Parameter(torch.empty(count, self.groups, self.proxy_dim).uniform_(-bound, bound))
        self.forget_bias = nn.Parameter((memory - 1).log().repeat(count, 1))  # [D, G]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        proxy = self.proxy(x)  # [B, S, H, W]
        u_proj = self.u_proj * self.merge[:, None, None]  # [D, C, S]
        y = _skip(self, x, proxy)
        for d, direction in enumerate(self.directions):
            f = torch.sigmoid(project(proxy, self.forget_proj[d]) + self.forget_bias[d, :, None, None])  # [B, G, H, W]
            # `stochastic_taps` times f, in fewer passes over memory than both apart.
            weights = project_taps(proxy, self.tap_proj[d]).sigmoid() * _existing(x, direction)  # [B, G, 3, H, W]
            taps = weights * (f / weights.sum(2)).unsqueeze(2)
            lam = project(proxy, self.lam_proj[d])  # [B, C, H, W]
            if self.convex:
                lam = (lam.unflatten(1, (self.groups, -1)) * (1 - f).unsqueeze(2)).flatten(1, 2)
            y = y + project(proxy, u_proj[d]) * line_scan(x, taps, lam, direction=direction)
        return y


class Convex(Forget):
    """``h = (1 - f) lam x + f (w h)``, the form of the first spatial propagation networks: at most ``max |lam x|``."""

    convex = True


def _skip(scan: GSPN2d, x: Tensor, proxy: Tensor) -> Tensor:
    """The input-dependent skip, ``[B, C, H, W]``; zeros without one."""
    if scan.skip_proj is None:
        return torch.zeros_like(x)
    return project(proxy, (scan.skip_proj * scan.merge[:, None, None]).sum(0)) * x


def _existing(x: Tensor, direction: str) -> Tensor:
    """1 for a neighbour that exists and 0 for one beyond the ends of a line, ``[3, H or 1, W or 1]``."""
    cross = scan_axes(direction).cross
    exists = x.new_ones(3, x.shape[cross])
    exists[0, 0] = exists[2, -1] = 0
    return exists[:, None] if cross == -1 else exists[:, :, None]


FORMS = {"forget": Forget, "convex": Convex, "average": Average}


@contextlib.contextmanager
def denoisers_scan_with(form: str) -> Iterator[None]:
    """Build the denoisers of the context with one of :data:`FORMS` in the place of the library's scan."""
    from gspn.models import denoiser

    kept = denoiser.GSPN2d
    denoiser.GSPN2d = FORMS[form]
    try:
        yield
    finally:
        denoiser.GSPN2d = kept


TRAINED, TESTED, SEEDS = (16, 24), (16, 24, 32, 64, 128), (0, 1, 2)
LAYERS: dict[str, Callable[[], GSPN2d]] = {
    "paper's scan": lambda: GSPN2d(2, proxy_dim=4, proxy_bias=True),
    "reference lines": lambda: GSPN2d(2, proxy_dim=4, proxy_bias=True, reference_lines=16),
    **{name: lambda form=form: form(2, proxy_dim=4, proxy_bias=True) for name, form in FORMS.items()},
}


def _images(count: int, size: int, seed: int) -> Tensor:
    """Random images of low frequencies, ``[count, 2, size, size]``; those of one seed are the same at every size."""
    amplitudes = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    frequency = torch.arange(4.0)
    basis = _waves(size)
    return torch.einsum("nckl,kh,lw->nchw", amplitudes / (1 + frequency[:, None] + frequency), basis, basis)


def _waves(size: int) -> Tensor:
    return torch.cos(torch.pi * torch.arange(4.0)[:, None] * (torch.arange(size) + 0.5) / size)  # [4, size]


def _cross(x: Tensor) -> Tensor:
    """At each pixel the mean of its row plus that of its column."""
    return x.mean(-1, keepdim=True) + x.mean(-2, keepdim=True)


def _blur(x: Tensor) -> Tensor:
    """A Gaussian blur over a fifth of the image."""
    size, frequency = x.shape[-1], torch.arange(4.0)
    damped = torch.exp(-((0.2 * torch.pi * frequency) ** 2) / 2) * torch.where(frequency == 0, 1, 2) / size
    along = torch.einsum("kh,kg,k->hg", _waves(size), _waves(size), damped)
    return torch.einsum("hg,nchw,vw->ncgv", along, x, along)


def main(output: Csv = None) -> None:
    """Train one layer of each form to compute something at 16 and 24 pixels, and test it at up to 128."""
    rows = []
    for task, expected in {"means of row and column": _cross, "blur": _blur}.items():
        for name, layer in LAYERS.items():
            for seed in SEEDS:
                torch.manual_seed(seed)
                module = layer()
                optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
                for update in range(200):
                    x = _images(8, TRAINED[update % len(TRAINED)], update)
                    F.mse_loss(module(x), expected(x)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                for size in TESTED:
                    with torch.no_grad():
                        x = _images(16, size, 1000)
                        error = ((module(x) - expected(x)).norm() / expected(x).norm()).item()
                    rows.append({"task": task, "layer": name, "seed": seed, "size": size, "error": error})
        shown = [
            [name]
            + [
                spread(r["error"] for r in rows if (r["task"], r["layer"], r["size"]) == (task, name, size))
                for size in TESTED
            ]
            for name in LAYERS
        ]
        print_table(f"{task}: error over the size of the answer", ("", *map(str, TESTED)), shown)
    write_csv(output, rows)


if __name__ == "__main__":
    typer.run(main)
