"""The protocol of a backend: a folder ``gspn/ops/NAME/`` with one module for each operator, named after it.

A backend says *how* an operator is computed, never *what*: every backend computes the functions of
:mod:`gspn.ops.reference`. Arguments have been checked before a backend sees them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class NotInstalled(str):
    """A reason that an install command would remove: an explicit request raises ImportError for it."""


class Backend(Protocol):
    """The contents of ``gspn/ops/NAME/__init__.py``, which imports nothing but torch before a call needs it."""

    __name__: str
    """The package's name; its last part is the backend's name."""

    DEVICES: tuple[str, ...]
    """Types of device that the backend is made for: where it refuses on one of them, a user is told why."""

    def why_not(self, device: torch.device, dtype: torch.dtype, op: str) -> str | None:
        """The reason why ``op`` cannot run on this device and dtype here, a full sentence with the remedy, or None."""
        ...


class LineScan(Protocol):
    """The functions of ``gspn/ops/NAME/line_scan.py``. Results are new tensors; no argument is written to."""

    def line_scan(
        self, x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, segment: int | None,
        valid_size: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The state ``h``, of the shape, dtype and strides of ``torch.empty_like(x)``; see :func:`gspn.line_scan`.

        Args:
            x: ``[B, C, H, W]``.
            taps: ``[B, G, 3, H, W]``.
            lam: ``[B, C, H, W]``, or None for ones.
            direction: one of :data:`gspn.DIRECTIONS`.
            segment: lines after which the scan restarts, or None.
            valid_size: int64 ``[B, 2]`` on x's device, the height and width of each image, or None. Whatever the
                values, no pixel beyond the map is read or written. Results and gradients in the padding are 0.
        """
        ...

    def line_scan_backward(
        self, grad: Tensor, h: Tensor, x: Tensor | None, taps: Tensor, lam: Tensor | None, direction: str,
        segment: int | None, need_taps: bool, need_lam: bool, valid_size: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients ``dx``, ``dtaps`` and ``dlam``, with the shape, dtype and layout of x, taps and lam.

        ``grad`` is the gradient of ``h``, and ``h`` the result of :meth:`line_scan`, or any tensor like it that takes
        its place in the formula of ``dtaps``. ``dtaps`` is None without ``need_taps``, ``dlam`` without ``need_lam`` or
        ``lam``. ``x`` may be None without ``need_lam``; ``dx`` is then laid out like ``h``.
        """
        ...


class Propagate(Protocol):
    """The functions of ``gspn/ops/NAME/propagate.py``. Results are new tensors; no argument is written to."""

    def propagate(
        self, x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor, skip_proj: Tensor | None,
        directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``y``, of the shape, dtype and strides of ``torch.empty_like(x)``; see :func:`gspn.ops.unfused.compose`.

        Args:
            x: ``[B, C, H, W]``.
            proxy: ``[B, S, H, W]``.
            tap_proj: ``[D, G, 3, S]``, as all projections in the dtype of the state: float64 for float64, else float32.
            lam_proj: ``[D, C, S]``.
            u_proj: ``[D, C, S]``, times the merge.
            skip_proj: ``[C, S]``, the sum over the directions of skip times merge; None for no skip.
            directions: D of :data:`gspn.DIRECTIONS`, each once.
            segment: lines after which every scan restarts, or None.
            valid_size: as for :meth:`LineScan.line_scan`.
        """
        ...

    def propagate_backward(
        self, grad: Tensor, x: Tensor, proxy: Tensor, tap_proj: Tensor, lam_proj: Tensor, u_proj: Tensor,
        skip_proj: Tensor | None, directions: tuple[str, ...], segment: int | None, valid_size: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The gradients ``dx, dproxy, dtap_proj, dlam_proj, du_proj, dskip_proj`` for ``grad``, that of ``y``.

        Those of x and proxy have their layout, those of the projections are contiguous; ``dskip_proj`` is None without
        a skip.
        """
        ...
