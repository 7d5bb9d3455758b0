"""Runs the Gluon kernel of propagate on the CPU; test_interpreter.py calls this where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gluon_interpreted import Interpreted
from propagate_support import check_forward, make_arguments
from torch import Tensor

import gspn


@contextmanager
def on_the_cpu(kernel: Any = None) -> Iterator[None]:
    """Within it calls of propagate launch the kernel in our interpreter."""
    from gspn.ops.triton import warp_scan_kernels

    compiled = warp_scan_kernels.warp_scan_kernel
    warp_scan_kernels.warp_scan_kernel = Interpreted(kernel or compiled)
    try:
        yield
    finally:
        warp_scan_kernels.warp_scan_kernel = compiled


def propagate(*arguments: Any, warps: int = 1) -> Tensor:
    """``y``, all of whose scans have been made by the kernel, with programs of so many warps."""
    from gspn.ops.triton.launch import limits_of, recorded
    from gspn.ops.triton.propagate import propagate as call

    limits = limits_of(torch.device("cpu"))
    limits = limits._replace(tensor_cores=True, together=False, choice=(("warps", warps),))
    with recorded() as launches:
        call(*arguments, limits=limits)
    assert [launch.kernel.__name__ for launch in launches].count("warp_scan_kernel") == len(arguments[6])
    return call(*arguments, limits=limits)


def check(_grad: Tensor, *arguments: Any, warps: int = 1) -> None:
    with on_the_cpu():
        check_forward(propagate(*arguments, warps=warps), *arguments)


QUICK = (
    make_arguments(1, 12, 3, 10, 8, 4, directions=("down", "left"))[1:],
    make_arguments(1, 2, 6, 10, 2, 1, directions=("up",), segment=2)[1:],
    make_arguments(1, 2, 4, 5, 2, 2, logits=1e4)[1:],
)
"""Arguments that show most faults."""


SIZES = (1, 2, 3, 7, 14, 15, 31, 32, 33, 56, 74, 127, 128)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.float16)


def rows_of_all_lengths() -> None:
    # Each length in every direction; each proxy, layout and dtype with several lengths and directions.
    for i, cross in enumerate(SIZES):
        for d, direction in enumerate(gspn.DIRECTIONS):
            n, lines = i + d, 2 + (i + d) % 3
            shape = (lines, cross) if direction in ("down", "up") else (cross, lines)
            arguments = make_arguments(
                1 + n % 2, (3, 8, 12)[n % 3], *shape, (2, 8, 16, 1, 5)[n % 5], (1, 0)[n % 2] or (3, 8, 12)[n % 3],
                DTYPES[n // 2 % 4], directions=(direction,), layout=LAYOUTS[(i + 2 * d) % 5], skip=n % 4 < 2, seed=n,
            )  # fmt: skip
            check(*arguments, warps=(1, 2, 4)[n // 2 % 3])


def all_directions() -> None:
    # One after the other, each adds to the sum so far; even and odd strides, several lines at once and one by one.
    for layout, (height, width), dtype in (
        ("contiguous", (12, 8), torch.float32), ("contiguous", (4, 6), torch.bfloat16),
        ("channels_last", (9, 5), torch.float16), ("contiguous", (7, 9), torch.float32),
    ):  # fmt: skip
        check(*make_arguments(2, 12, height, width, 8, 4, dtype, layout=layout), warps=2)
    check(*make_arguments(1, 40, 3, 4, 3, 5, directions=("up", "left"), skip=False), warps=4)


def segments() -> None:
    check(*make_arguments(1, 2, 70, 3, 2, 1, directions=("up", "down"), segment=5))
    check(*make_arguments(1, 2, 3, 64, 2, 2, directions=("left", "right"), segment=7))
    check(*make_arguments(1, 2, 3, 6, 2, 2, directions=("left", "up"), segment=1))


def large_logits() -> None:
    for scale, sign in ((1e4, 1), (1e2, 0), (1e4, 0), (1e2, -1), (1e4, -1)):
        check(*make_arguments(1, 2, 4, 5, 2, 2, logits=scale, sign=sign))
    # With states near the largest number.
    for scale in (1.0, 300.0):
        grad, x, *rest = make_arguments(1, 2, 4, 5, 2, 2, logits=scale)
        check(grad, x * 2e36, *rest)


def infinite_logits() -> None:
    with on_the_cpu():
        _check_infinite_logits()


def _check_infinite_logits() -> None:
    # As the same logits are that are large and finite.
    for some, side in itertools.product(((-1, -1, -1), (-1, 0, -1), (1, 1, -1), (1, 0, 0)), (1, -1)):
        _, x, proxy, tap_proj, lam, u, _, *rest = make_arguments(1, 2, 3, 4, 1, 2, skip=False)
        # Times 1.25 log2(e), what the first part leaves of a number has the other sign.
        taps = torch.tensor(some, dtype=torch.float32).view(1, 1, 3, 1).expand_as(tap_proj) * 1.25
        infinite, large = (
            propagate(x, torch.full_like(proxy, size), taps * size, lam / size, u / size, None, *rest)
            for size in (side * 2.0**112, side * 2.0**10)
        )
        assert infinite.isfinite().all()
        torch.testing.assert_close(infinite, large)


BROKEN = (
    ("(lane + 3) & 3)", "(lane + 1) & 3)"),  # both neighbours from one side
    ("+ lane // 4\n", "+ lane % 8\n"),  # a channel in other lanes than those of the product's row
    ("lane % 4 * 2\n", "lane % 4\n"),  # pixels in other lanes than those of the product's columns
    ("(upper[q], lower[q], upper[q + 1], lower[q + 1])", "(upper[q], upper[q + 1], lower[q], lower[q + 1])"),
    ("zeros, upper[FOURS:]", "zeros, upper[:FOURS]"),  # a low part that is missing
    ("proxy[:FOURS] + proxy[FOURS:]", "proxy[:FOURS] + proxy[:LOWS]"),
    ('logits[2], float("inf")', "logits[2], 0.0"),  # a tap that points beyond the row
    ("b_1_new, 0.0)", "b_1_new, b_1_new)"),  # states beyond the row
    ("if j < TILES - 1 else b_zero", "if j < 0 else b_zero"),  # a neighbour in the next tile
    ("mine.m_last[i] if j == TILES - 1 else mine.m_lane", "mine.m_lane"),  # a store beyond the row
    ("gl.load(p, mask=mine.m_last[i])", "gl.load(p)"),
    ("[1, 1], [1, 32], [1, WARPS]", "[1, 2], [1, 16], [1, WARPS]"),  # lanes with other elements
    ("b_bound + _shuffled(b_bound, lane ^ 2)", "b_bound * 0.0"),  # logits that are taken for small ones
    ("if LARGE:\n        #", "if False:\n        #"),
    ("(LINES - 1 - n if REVERSE else n)", "n"),  # lines of a tile out of order
    ("% n_segment != 0", "% n_segment >= 0"),
    ("m_lane & (i_last < n_cross)", "(i_last < n_cross)"),  # channels that do not exist
)
"""Parts of the kernel's code, and what makes it wrong."""


def broken_kernels() -> None:
    # Any of these changes is seen.
    from gspn.ops.triton import warp_scan_kernels

    path = Path(warp_scan_kernels.__file__)
    code = path.read_text()
    for part, instead in BROKEN:
        assert code.count(part) == 1, part
        with tempfile.TemporaryDirectory() as folder:
            broken = Path(folder) / "broken.py"
            broken.write_text(code.replace(part, instead))
            spec = importlib.util.spec_from_file_location("gspn.ops.triton.broken", broken)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            try:
                with on_the_cpu(module.warp_scan_kernel):
                    for arguments in QUICK:
                        check_forward(propagate(*arguments), *arguments)
                    _check_infinite_logits()
            except (AssertionError, ValueError):
                continue
        raise AssertionError(f"{instead!r} in place of {part!r} is not seen")
