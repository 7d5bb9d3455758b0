"""Shared by the tests of the operators: shapes, layouts, pairwise cases, and the rule for a right implementation."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn.ops.cpu import instruction_set, instruction_sets

ROOT = Path(__file__).resolve().parents[1]

# Small, odd, flat, tall, below and above the width of a vector, of a staged tile and of a block of channels.
SHAPES = [(1, 1), (1, 5), (7, 1), (2, 2), (9, 6), (17, 35), (33, 16)]
SEGMENTS = [None, 1, 2, 5]
LAYOUTS = ["contiguous", "channels_last", "channels_last_taps_inner", "sliced", "expanded", "transposed"]
CPU_IMPLS = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value from each of two or more axes, in which every two values of different axes meet at least once.

    Greedy and deterministic: each row starts from the first pair that no row has yet, and takes from every other axis
    the value that adds the most new pairs. Three axes of 4, 7 and 4 values need 28 rows instead of 112.
    """
    pairs = [
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(range(len(axes[i])), range(len(axes[j])))
    ]
    missing = dict.fromkeys(pairs)  # a set that keeps its order
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for axis, values in enumerate(axes):
            if axis not in row:

                def new_pairs(value: int, axis: int = axis, row: dict[int, int] = row) -> int:
                    return sum(tuple(sorted([(axis, value), other])) in missing for other in row.items())

                row[axis] = max(range(len(values)), key=new_pairs)
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(values[row[axis]] for axis, values in enumerate(axes)))
    return rows


def every_pair(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over :func:`pairwise` cases of the named axes."""
    # Functions by their names: their addresses differ between the processes that share the tests.
    ids = lambda value: getattr(value, "__name__", str(value))  # noqa: E731
    return pytest.mark.parametrize(",".join(axes), pairwise(*axes.values()), ids=ids)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block on ``count`` threads; tests run on one otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def check_line_scan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], direction: str, segment: int | None, with_lam: bool = True
) -> None:
    """The CPU kernels, with each instruction set, against the specification: the state and every gradient."""
    arguments = {"direction": direction, "segment": segment}
    x, taps, lam, grad = (t if with_lam or i != 2 else None for i, t in enumerate(tensors))
    plain = scan_and_gradients(x, taps, lam, grad, impl="reference", **arguments)
    doubles = [None if t is None else t.double() for t in (x, taps, lam, grad)]
    exact = scan_and_gradients(*doubles, h=plain["h"].double(), impl="reference", **arguments)
    magnitude = scan_and_gradients(*(None if t is None else t.abs() for t in doubles), impl="reference", **arguments)
    for isa in instruction_sets():
        with instruction_set(isa):
            actual = scan_and_gradients(x, taps, lam, grad, h=plain["h"], impl="cpu", **arguments)
        for name in plain:
            assert_as_exact_as_pytorch(actual[name], plain[name], exact[name], magnitude[name], f"{isa} {name}")


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
