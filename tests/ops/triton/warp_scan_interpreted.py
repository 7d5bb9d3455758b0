"""Runs the Gluon kernel of propagate on the CPU; test_interpreter.py calls this where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import propagate_support
import torch
from gluon_interpreted import Interpreted
from propagate_support import check_forward, make_arguments
from torch import Tensor

import gspn
from gspn.ops.unfused import project, project_taps
from support import assert_as_exact_as_pytorch


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


def _limits(warps: int) -> Any:
    """Those of calls all of whose scans are the kernel's, with programs of so many warps."""
    from gspn.ops.triton.launch import limits_of

    limits = limits_of(torch.device("cpu"))
    return limits._replace(tensor_cores=True, together=False, choice=(("warps", warps),))


def propagate(*arguments: Any, warps: int = 1) -> Tensor:
    """``y``, all of whose scans have been made by the kernel."""
    from gspn.ops.triton.launch import recorded
    from gspn.ops.triton.propagate import propagate as call

    with recorded() as launches:
        call(*arguments, limits=_limits(warps))
    assert [launch.kernel.__name__ for launch in launches].count("warp_scan_kernel") == len(arguments[6])
    return call(*arguments, limits=_limits(warps))


def states(grad: Tensor, *arguments: Any, warps: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The states and the adjoint states of each direction by the kernel, in float32."""
    from gspn.ops.triton.propagate import plan_scan, prepare_scan, projections
    from gspn.ops.triton.proxy import Proxy

    x, proxy, *weights, directions, segment = arguments
    of_all, copies = projections(*weights), Proxy(proxy)
    pairs = []
    for d, direction in enumerate(directions):
        pair = []
        for source, adjoint in ((x, False), (grad, True)):
            out = torch.empty_like(x, dtype=torch.float32).fill_(float("nan"))
            plan = plan_scan(source, out, of_all, d, direction, segment, _limits(warps), adjoint=adjoint)
            launch = prepare_scan(plan, source, None, out, copies, of_all, direction)
            assert launch.kernel.__name__ == "warp_scan_kernel"
            launch.run()
            pair.append(out)
        pairs.append((pair[0], pair[1]))
    return pairs


def _states_by_formula(grad: Tensor, *arguments: Any) -> list[tuple[Tensor, Tensor]]:
    from gspn.ops import reference

    x, proxy, tap_proj, lam_proj, u_proj, _, directions, segment = arguments
    pairs = []
    for d, direction in enumerate(directions):
        taps = gspn.stochastic_taps(project_taps(proxy, tap_proj[d]), direction=direction)
        u, ones = project(proxy, u_proj[d]), torch.ones_like(x)
        h = reference.line_scan(x, taps, project(proxy, lam_proj[d]), direction, segment)
        # With a lam of one, the gradient of what goes in is the adjoint state.
        g, *_ = reference.line_scan_backward(grad * u, h, x, taps, ones, direction, segment, True, True)
        pairs.append((h, g))
    return pairs


def check_states(actual: list[tuple[Tensor, Tensor]], *arguments: Any) -> None:
    """States and adjoint states against float64, by the rule that all implementations follow."""
    plain, exact, largest = (
        _states_by_formula(*(change(t) if isinstance(t, Tensor) else t for t in arguments))
        for change in (Tensor.float, Tensor.double, lambda t: t.double().abs())
    )
    for pairs in zip(actual, plain, exact, largest, strict=True):
        for name, *results in zip(("states", "adjoint states"), *pairs, strict=True):
            what = f"{name} {arguments[7:]} {arguments[1].shape=} {arguments[3].shape=} {arguments[1].stride()=}"
            actual_one, plain_one, *others = results
            plain_one = torch.empty_like(actual_one).copy_(plain_one)
            assert_as_exact_as_pytorch(actual_one, plain_one, *others, what)


def check(*arguments: Any, warps: int = 1) -> None:
    """The result, the states and the adjoint states."""
    with on_the_cpu():
        check_forward(propagate(*arguments[1:], warps=warps), *arguments[1:])
        check_states(states(*arguments, warps=warps), *arguments)


QUICK = (
    make_arguments(1, 12, 3, 10, 8, 4, directions=("down", "left")),
    make_arguments(1, 2, 6, 10, 2, 1, directions=("up",), segment=2),
    make_arguments(1, 2, 4, 5, 2, 2, logits=1e4),
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


def gradients() -> None:
    """Of a call whose scans are all the kernel's."""
    from gspn.ops.triton.launch import recorded
    from gspn.ops.triton.propagate import propagate_backward

    for shape, how in (
        ((1, 12, 5, 9, 8, 4), {"segment": 3}),
        ((2, 8, 6, 4, 2, 8), {"dtype": torch.bfloat16, "layout": "channels_last", "skip": False}),
    ):
        arguments = make_arguments(*shape, **how)
        with recorded() as launches:
            propagate_backward(*arguments, limits=_limits(1))
        assert [launch.kernel.__name__ for launch in launches].count("warp_scan_kernel") == 8
        _check_all(*arguments)


def _check_all(*arguments: Any) -> None:
    """The result and every gradient."""
    with on_the_cpu():
        propagate_support.check(*arguments, **_limits(1)._asdict())


def segments() -> None:
    check(*make_arguments(1, 2, 70, 3, 2, 1, directions=("up", "down"), segment=5))
    check(*make_arguments(1, 2, 3, 64, 2, 2, directions=("left", "right"), segment=7))
    check(*make_arguments(1, 2, 3, 6, 2, 2, directions=("left", "up"), segment=1))


def large_logits() -> None:
    for scale, sign in ((1e4, 1), (1e2, 0), (1e4, 0), (1e2, -1), (1e4, -1)):
        _check_all(*make_arguments(1, 2, 4, 5, 2, 2, logits=scale, sign=sign))
    # With states near the largest number.
    for scale in (1.0, 300.0):
        grad, x, *rest = make_arguments(1, 2, 4, 5, 2, 2, logits=scale)
        _check_all(grad, x * 2e36, *rest)


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
    ("b_states[2 * j + 2] if j < TILES - 1", "b_states[2 * j + 2] if j < 0"),  # a neighbour in the next tile
    ("mine.m_last[i] if j == TILES - 1 else mine.m_lane", "mine.m_lane"),  # a store beyond the row
    ("gl.load(p, mask=mine.m_last[i])", "gl.load(p)"),
    ("[1, 1], [1, 32], [1, WARPS]", "[1, 2], [1, 16], [1, WARPS]"),  # lanes with other elements
    ("b_bound + _shuffled(b_bound, lane ^ 2)", "b_bound * 0.0"),  # logits that are taken for small ones
    ("if LARGE:\n        #", "if False:\n        #"),
    ("(LINES - 1 - n if REVERSE != ADJOINT else n)", "n"),  # lines of a tile out of order
    ("if SEGMENTED and not ADJOINT:", "if False:"),
    ("m_lane & (i_last < n_cross)", "(i_last < n_cross)"),  # channels that do not exist
    ("of_0[1] * b_0_new + of_1[0] * b_1_new", "of_0[1] * b_0_new + of_0[0] * b_1_new"),  # the tap of another pixel
    ("(of_0[0] * b_0_new,), b_ahead + (of_1[2] * b_1_new,)", "(of_0[2] * b_0_new,), b_ahead + (of_1[0] * b_1_new,)"),
    ("b_ahead[j - 1] if j > 0", "b_ahead[j] if j > 0"),  # what another tile hands on
    ("n_rounds - 1 - i_round if ADJOINT", "n_rounds - i_round if ADJOINT"),  # lines that do not exist
    ("if SEGMENTED:\n", "if False:\n"),
    ("p_u if ADJOINT else p_lam", "p_lam"),
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
                        check_forward(propagate(*arguments[1:]), *arguments[1:])
                    for arguments in QUICK[:2]:
                        check_states(states(*arguments), *arguments)
                    _check_infinite_logits()
            except (AssertionError, ValueError):
                continue
        raise AssertionError(f"{instead!r} in place of {part!r} is not seen")
