"""What the tests of the operators share: shapes, layouts, and the rule that says when an implementation is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

# Small, odd, flat, tall, below and above the width of a vector, of a staged tile and of a block of channels.
SHAPES = [(1, 1), (1, 5), (7, 1), (2, 2), (9, 6), (17, 35), (33, 16)]
SEGMENTS = [None, 1, 2, 5]
LAYOUTS = ["contiguous", "channels_last", "channels_last_taps_inner", "sliced", "expanded", "transposed"]
CPU_IMPLS = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor`` (``[B, C, H, W]`` or ``[B, G, 3, H, W]``) somewhere else in memory."""
    if layout == "contiguous":
        return tensor
    if layout == "channels_last":  # taps: [B, H, W, 3, G]
        order = (0, 2, 3, 1) if tensor.dim() == 4 else (0, 3, 4, 2, 1)
    elif layout == "channels_last_taps_inner":  # what a convolution to 3 G channels gives: [B, H, W, G, 3]
        order = (0, 2, 3, 1) if tensor.dim() == 4 else (0, 3, 4, 1, 2)
    elif layout == "transposed":
        return tensor.mT.contiguous().mT
    elif layout == "sliced":
        big = torch.full([2 * size + 1 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
        view = big[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
        return view.copy_(tensor)
    elif layout == "expanded":
        return tensor[:1, ..., :1].expand_as(tensor)
    elif layout == "expanded_channels":
        return tensor[:, :1].expand_as(tensor)
    else:
        raise ValueError(f"{layout=}")
    inverse = [order.index(axis) for axis in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(inverse)


def make_inputs(
    batch: int, channels: int, height: int, width: int, groups: int, dtype: torch.dtype, *, layout: str = "contiguous",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``x, taps, lam, grad``: random, with taps whose magnitudes sum to less than one, so that float16 suffices."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    x, lam, grad = (random(batch, channels, height, width) for _ in range(3))
    taps = random(batch, groups, 3, height, width) / 3
    return tuple(laid_out(t.to(dtype), layout) for t in (x, taps, lam, grad))  # type: ignore[return-value]


def scan_and_gradients(
    x: Tensor, taps: Tensor, lam: Tensor | None, grad: Tensor, *, h: Tensor | None = None, direction: str,
    segment: int | None, impl: str,
) -> dict[str, Tensor]:  # fmt: skip
    """The state and every gradient; the gradients at the given ``h``, so that implementations start from the same."""
    state = torch.ops.gspn.line_scan(x, taps, lam, direction, segment, impl)
    dx, dtaps, dlam = torch.ops.gspn.line_scan_backward(
        grad, state if h is None else h, x if lam is not None else None, taps, lam, direction, segment, impl, True,
        lam is not None,
    )  # fmt: skip
    results = {"h": state, "dx": dx, "dtaps": dtaps}
    return results if lam is None else results | {"dlam": dlam}


def assert_as_exact_as_pytorch(
    actual: Tensor, plain: Tensor, exact: Tensor, magnitude: Tensor, what: str = "result"
) -> None:
    """The rule for right: the error against float64 is at most twice plain PyTorch's in the same dtype.

    Plain PyTorch may be exact by luck where an implementation sums in another order (and in float64 it is what it is
    compared with), so two roundings of the largest sum of absolute terms, ``magnitude``, are always allowed.
    """
    assert actual.shape == plain.shape, f"{what}: {actual.shape=} {plain.shape=}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype=} {plain.dtype=}"
    assert actual.stride() == plain.stride(), f"{what}: {actual.stride()=} {plain.stride()=}"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    allowed = max(2 * plain_error, 2 * torch.finfo(plain.dtype).eps * magnitude.max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, plain PyTorch {plain_error:.3g}, allowed {allowed:.3g}"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter and return what it printed; a failure shows its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
