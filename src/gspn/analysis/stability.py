r"""Whether the scans of a network are as stable on an image as the theory says.

With taps that sum to one over the neighbours that exist (the Stability-Context Condition, GSPN, arXiv 2501.12381,
section 3.2) every path is non-expansive, and a state is a sum of as many averages as lines were scanned:

.. math::
    |h_i| \le b_i = \sum_{j \le i} \max_{\text{line } j} |\lambda_j x_j|

It grows with the length of the scan, which half precision has to hold.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from gspn.nn import GSPN2d
from gspn.ops import Direction
from gspn.ops.directions import scan_axes

from .._files import replaced
from .scans import Scan, scans_of, visit_scans


@dataclass(frozen=True)
class ScanStability:
    """One scan of a network on an image, all channels together."""

    module: str
    direction: Direction
    height: int
    width: int
    channels: int
    segment: int | None
    tap_sum_min: float
    """The smallest sum, over the neighbours that exist, of a pixel's taps: 1 to rounding."""
    tap_sum_max: float
    """The largest."""
    input_max: float
    """The largest magnitude that a pixel adds, ``max |lam x|``."""
    state_max: float
    """The largest magnitude of a state."""
    bound_max: float
    """The largest bound b_i of a line, over all lines and channels: what the states might have grown to."""
    bound_used: float
    """The largest ``max |h_i| / b_i`` of a line of a channel: at most 1 to rounding, and 1 on a first line."""
    float16_finite: bool
    """Whether every state is finite in float16, whose largest number is 65504."""

    @property
    def growth(self) -> float:
        """How many times the largest input the largest state is: at most the lines scanned without a restart."""
        return self.state_max / self.input_max if self.input_max else 0.0

    @property
    def ok(self) -> bool:
        """Whether the condition and the bound hold, to the rounding of float32 sums over the lines."""
        lines = self.height if scan_axes(self.direction).line == -2 else self.width
        slack = 4 * torch.finfo(torch.float32).eps * (lines + 3)
        in_bound = self.bound_used <= 1 + slack  # False for NaN
        return in_bound and 1 - slack <= self.tap_sum_min and self.tap_sum_max <= 1 + slack


def scan_stability(name: str, module: GSPN2d, x: Tensor) -> list[ScanStability]:
    """The stability of each scan of a module on its input.

    Args:
        name: what to call the module.
        module: the propagation.
        x: its input, ``[B, C, H, W]``, not empty.

    Returns:
        An entry for each direction.

    Example:
        >>> import torch
        >>> from gspn.analysis import scan_stability
        >>> from gspn.nn import GSPN2d
        >>> [entry.ok for entry in scan_stability("gspn", GSPN2d(8), torch.randn(1, 8, 9, 7))]
        [True, True, True, True]
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"{x.shape=}: pass the input of the module, [B, {module.dim}, H, W], of at least one pixel.")
    return [_measured(name, scan, x.to(scan.taps.dtype)) for scan in scans_of(module, x)]


def stability_report(model: nn.Module, image: Tensor) -> list[ScanStability]:
    """The stability of every scan of a network on an image.

    Args:
        model: the network; run once, in evaluation mode.
        image: ``[B, in_chans, H, W]``, normalised as the network wants it.

    Returns:
        An entry for each :class:`gspn.nn.GSPN2d` and direction, in the order of the network.

    Raises:
        ValueError: the network has no scans.

    Example:
        >>> import torch
        >>> from gspn.analysis import stability_report
        >>> from gspn.models import GSPN
        >>> report = stability_report(GSPN(dims=(16, 32), depths=(1, 1)), torch.randn(1, 3, 40, 64))
        >>> len(report), all(entry.ok and entry.float16_finite for entry in report)
        (8, True)
    """
    report: list[ScanStability] = []
    visit_scans(model, image, lambda name, module, x: report.extend(scan_stability(name, module, x)))
    return report


def write_stability(path: Path, report: Sequence[ScanStability]) -> None:
    """Write a CSV of one row for each entry, replacing the file as a whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    names = [field.name for field in fields(ScanStability)]
    with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*names, "growth", "ok"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(entry) | {"growth": entry.growth, "ok": entry.ok} for entry in report)


@torch.no_grad()
def _measured(name: str, scan: Scan, x: Tensor) -> ScanStability:
    axes = scan_axes(scan.along)
    states = scan.states(x)
    # The taps of neighbours that do not exist are left out, whatever they hold.
    taps = scan.taps.movedim(axes.cross, -1)  # [B, G, 3, lines, n]
    sums = taps[:, :, 1].clone()
    sums[..., 1:] += taps[:, :, 0, :, 1:]
    sums[..., :-1] += taps[:, :, 2, :, :-1]

    heights = states.abs().amax(axes.cross)  # [B, C, lines]
    added = (scan.lam * scan.turned(x)).abs().amax(axes.cross)
    if axes.reverse:
        heights, added = heights.flip(-1), added.flip(-1)
    bounds = _sums_so_far(added.double(), scan.segment)
    # Where nothing was added the state is exactly 0 and uses nothing of its bound.
    used = torch.where((bounds == 0) & (heights == 0), 0.0, heights.double() / bounds)
    return ScanStability(
        module=name,
        direction=scan.direction,
        height=x.shape[2],
        width=x.shape[3],
        channels=x.shape[1],
        segment=scan.segment,
        tap_sum_min=sums.min().item(),
        tap_sum_max=sums.max().item(),
        input_max=added.max().item(),
        state_max=heights.max().item(),
        bound_max=bounds.max().item(),
        bound_used=used.max().item(),
        float16_finite=bool(states.half().isfinite().all()),
    )


def _sums_so_far(added: Tensor, segment: int | None) -> Tensor:
    """Cumulative sums over the last axis that start again with every segment."""
    if segment is None:
        return added.cumsum(-1)
    return torch.cat([part.cumsum(-1) for part in added.split(segment, -1)], -1)
