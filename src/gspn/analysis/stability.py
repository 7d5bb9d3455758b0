"""The stability of a model's scans on an image, compared with the theory.

If taps sum to one over the neighbours that exist (the Stability-Context Condition; GSPN, arXiv 2501.12381, section
3.2), every path is non-expansive, and the state of a line is a sum of one average for each line scanned so far::

    |h_i| <= Σ_{j <= i} max |lam_j x_j|        the largest of each line j

This bound grows with the length of the scan, which half precision has to represent.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from .._files import replaced
from ..nn import GSPN2d
from ..ops import Direction
from ..ops.directions import scan_axes
from .scans import Scan, scans_of, visit_scans


@dataclass(frozen=True)
class ScanStability:
    """One scan of a model on an image, for all channels together."""

    module: str
    direction: Direction
    height: int
    width: int
    channels: int
    segment: int | None
    tap_sum_min: float
    """The smallest sum of a pixel's taps over the neighbours that exist: 1 up to rounding."""
    tap_sum_max: float
    """The largest."""
    input_max: float
    """The largest magnitude that a pixel adds, ``max |lam x|``."""
    state_max: float
    """The largest magnitude of a state."""
    bound_max: float
    """The largest bound b_i over all lines and channels."""
    bound_used: float
    """The largest ``max |h_i| / b_i`` over all lines and channels: at most 1 up to rounding, and 1 on a first line."""
    float16_finite: bool
    """Whether every state is finite in float16, whose largest number is 65504."""

    @property
    def growth(self) -> float:
        """The largest state divided by the largest input: at most the number of lines scanned without a restart."""
        return self.state_max / self.input_max if self.input_max else 0.0

    @property
    def ok(self) -> bool:
        """Whether the condition and the bound hold up to the rounding of float32 sums over the lines."""
        lines = self.height if scan_axes(self.direction).line == -2 else self.width
        slack = 4 * torch.finfo(torch.float32).eps * (lines + 3)
        in_bound = self.bound_used <= 1 + slack  # False for NaN
        return in_bound and 1 - slack <= self.tap_sum_min and self.tap_sum_max <= 1 + slack


def scan_stability(name: str, module: GSPN2d, x: Tensor) -> list[ScanStability]:
    """Measure the stability of each scan of a module on its input ``[B, C, H, W]``, with an entry for each direction.

    ``name`` is the name of the module in the report.

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
    """Measure the stability of every scan of a model on an image.

    Args:
        model: the model, which runs once in evaluation mode.
        image: ``[B, in_chans, H, W]``, normalized for the model.

    Returns:
        An entry for each :class:`gspn.nn.GSPN2d` and direction, in the order of the model.

    Raises:
        ValueError: the model has no scans.

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
    """Write a CSV with a row for each entry, replacing the file as a whole or not at all.

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
    axes = scan_axes(scan.scan_direction)
    states = scan.states(x)
    # The taps of neighbours that do not exist are left out, whatever they hold.
    taps = scan.taps.movedim(axes.cross, -1)  # [B, G, 3, lines, n]
    sums = taps[:, :, 1].clone()
    sums[..., 1:] += taps[:, :, 0, :, 1:]
    sums[..., :-1] += taps[:, :, 2, :, :-1]

    heights = states.abs().amax(axes.cross)  # [B, C, lines]
    added = (cast("Tensor", scan.lam) * scan.reoriented(x)).abs().amax(axes.cross)
    if axes.reverse:
        heights, added = heights.flip(-1), added.flip(-1)
    # The sums start again with every segment.
    segments = added.double().split(scan.segment or added.shape[-1], -1)
    bounds = torch.cat([part.cumsum(-1) for part in segments], -1)
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
