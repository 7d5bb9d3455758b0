"""Runs the kernels of propagate on the CPU; test_interpreter.py calls this where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from propagate_support import check, make_arguments
from torch import Tensor

import gspn


def combinations() -> None:
    # An orthogonal array: over 25 cases every two of the six axes meet in all their values.
    shapes = [(1, 1), (1, 5), (7, 1), (3, 4), (9, 6)]
    layouts = ["contiguous", "channels_last", "sliced", "expanded", "transposed"]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32]
    for i in range(25):
        a, b = i % 5, i // 5
        states, groups, segment = (1, 2, 5, 8, 16)[(a + b) % 5], (1, 2, 4, 1, 4)[(a + 2 * b) % 5], (a + 4 * b) % 5
        directions = (gspn.DIRECTIONS[i % 4], gspn.DIRECTIONS[(i + 1 + i // 4 % 3) % 4])
        arguments = make_arguments(
            1 + i % 9 // 8, 4, *shapes[a], states, groups, dtypes[(a + 3 * b) % 5], layout=layouts[b],
            directions=directions, segment=(None, 1, 2, 5, None)[segment], skip=i // 2 % 2 == 0,
        )  # fmt: skip
        check(*arguments)
    # More channels than one block has, in groups that blocks do and do not fit.
    check(*make_arguments(2, 20, 3, 4, 3, 5, directions=("up", "left")))
    check(*make_arguments(1, 36, 2, 3, 17, 2, directions=("right",)))
    # A gradient of a sum has stride 0 everywhere, and only the proxy may be channels_last.
    grad, *arguments = make_arguments(1, 3, 4, 3, 2, 1)
    arguments[1] = arguments[1].to(memory_format=torch.channels_last)
    check(torch.ones(()).expand_as(grad), *arguments)


def runs_of_segments() -> None:
    # More lines than one program takes.
    check(*make_arguments(1, 2, 70, 3, 2, 1, directions=("up", "down"), segment=5, layout="channels_last"))
    check(*make_arguments(1, 2, 3, 61, 2, 2, directions=("left",), segment=7))


def large_logits() -> None:
    for scale, sign in ((1e4, 1), (1e2, 0), (1e4, 0), (1e2, -1), (1e4, -1)):
        check(*make_arguments(1, 2, 4, 5, 2, 2, logits=scale, sign=sign))


def large_states() -> None:
    # Beside taps of e-300, and with gradients that keep sums in range; a difference of two such states may be infinite.
    for scale in (1.0, 300.0):
        grad, x, *rest = make_arguments(1, 2, 4, 5, 2, 2, logits=scale)
        check(grad / 4096, x * 2e36, *rest)
    grad, x, proxy, tap_proj, *gates, _, _ = make_arguments(1, 1, 2, 3, 1, 1, directions=("down",), skip=False)
    one = torch.ones_like(gates[0])
    x[0, 0, 0] = torch.tensor([3e38, -3e38, 3e38])
    check(grad * 1e-6, x, torch.ones_like(proxy), tap_proj, one, one / 1e3, None, ("down",), None)


def infinite_logits() -> None:
    # As the same logits are that are large and finite: equal where all are -inf, a sigmoid of 1 for +inf. A proxy that
    # is negative everywhere is as large as a positive one.
    from gspn.ops.triton import propagate

    for some, side in itertools.product(((-1, -1, -1), (-1, 0, -1), (1, 1, -1), (1, 0, 0)), (1, -1)):
        _, x, proxy, tap_proj, lam, u, _, *rest = make_arguments(1, 2, 3, 4, 1, 2, skip=False)
        taps = torch.tensor(some, dtype=torch.float32).view(1, 1, 3, 1).expand_as(tap_proj)
        infinite, large = (
            propagate.propagate(x, torch.full_like(proxy, size), taps * size, lam / size, u / size, None, *rest)
            for size in (side * 1e35, side * 1e3)
        )
        assert infinite.isfinite().all()
        torch.testing.assert_close(infinite, large)


@triton.jit
def _rough(b, b_exact, RELATIVE: tl.constexpr):
    """A result that is wrong by a part of it, up or down as the argument's last bit says, and never subnormal."""
    b_rough = b_exact * tl.where((b.to(tl.int32, bitcast=True) & 1) == 0, 1.0 - RELATIVE, 1.0 + RELATIVE)
    return tl.where(tl.abs(b_exact) < 1.1754943508222875e-38, 0.0, b_rough)


@triton.jit
def _rough_exp2(b, PTX: tl.constexpr):
    return _rough(b, tl.math.exp2(b), 2.0**-22)


@triton.jit
def _rough_inverse(b, PTX: tl.constexpr):
    return _rough(b, 1.0 / b, 2.0**-23)


def approximate_instructions() -> None:
    # The errors that PTX states for ex2.approx.ftz and rcp.approx.ftz, and a little more.
    from gspn.ops.triton import gradients_kernels, taps

    exact = taps.exp2, taps.inverse
    for module in (taps, gradients_kernels):
        module.exp2, module.inverse = _rough_exp2, _rough_inverse
    for scale, sign in ((1.0, 0), (1e2, 0), (1e4, -1)):
        check(*make_arguments(1, 2, 6, 7, 2, 2, logits=scale, sign=sign))
    check(*make_arguments(1, 4, 4, 9, 8, 1, torch.float16, layout="channels_last"))
    for module in (taps, gradients_kernels):
        module.exp2, module.inverse = exact


def _long(count: int, cross: int, direction: str) -> tuple[int, int]:
    return (count, cross) if direction in ("down", "up") else (cross, count)


def long_rows() -> None:
    for i, direction in enumerate(gspn.DIRECTIONS):
        # More lines than a block's halo is wide, so that states cross from one round of blocks to the next.
        shape, layout = _long(11, 40, direction), ("contiguous", "channels_last")[i // 2 == i % 2]
        check(*make_arguments(1, 2, *shape, 2, 1 + i % 2, directions=(direction,), layout=layout), row=32)
    check(*make_arguments(1, 1, 4, 70, 1, 1, directions=("down",), segment=3), row=32)
    # A lane takes more than one pixel.
    check(*make_arguments(1, 1, 3, 67, 1, 1, directions=("up",)), row=64)


def rows_and_lanes() -> None:
    # Rows within a warp and beyond it, several of them, in chunks that they fill or do not.
    check(*make_arguments(1, 5, 2, 74, 1, 1, directions=("down",), skip=False))
    check(*make_arguments(1, 3, 147, 2, 1, 3, torch.bfloat16, directions=("left",)))
    check(*make_arguments(1, 5, 56, 2, 1, 1, directions=("right",), layout="channels_last"))
    check(*make_arguments(1, 2, 2, 300, 1, 2, directions=("up",), skip=False))


def through_the_operator() -> None:
    grad, *tensors, skip, directions, segment = make_arguments(1, 2, 3, 4, 2, 1)
    results = []
    for impl in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        everywhere = skip.expand(4, -1, -1).clone().requires_grad_()
        merge = torch.tensor([0.5, -1.0, 2.0, 1.0], requires_grad=True)
        y = gspn.propagate(*leaves, everywhere, merge, directions=directions, segment=segment, impl=impl)
        results.append([y, *torch.autograd.grad(y, [*leaves, everywhere, merge], grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert gspn.available_impls(grad)["triton"] is None


def empty() -> None:
    from gspn.ops.triton import propagate

    for shape in [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)]:
        grad, *arguments = make_arguments(*shape, 2, 1)
        assert propagate.propagate(*arguments).shape == shape
        gradients: Sequence[Tensor | None] = propagate.propagate_backward(grad, *arguments)
        for gradient, argument in zip(gradients, arguments[:6], strict=True):
            assert gradient.shape == argument.shape
            assert not gradient.any()


def many_spans() -> None:
    # Some blocks of channels have a sum for the proxy together, others one of their own.
    check(*make_arguments(1, 68, 2, 3, 16, 1, directions=("down", "right")))
    check(*make_arguments(2, 40, 2, 3, 1, 40, directions=("up",)))


def few_programs() -> None:
    # A program takes several tiles, the last of which is not full, of several batch entries and blocks of channels; and
    # the gradients take one direction after the other.
    from gspn.ops.triton import gradients

    everything = gradients._PROGRAMS, gradients._STATES
    gradients._PROGRAMS, gradients._STATES = 2, 0
    check(*make_arguments(2, 18, 3, 19, 3, 9, directions=("up", "right")))
    check(*make_arguments(1, 5, 5, 21, 9, 1, torch.bfloat16, directions=("left", "down"), layout="channels_last"))
    check(*make_arguments(2, 3, 4, 4, 18, 3, directions=("down",), segment=2, layout="sliced", skip=False))
    gradients._PROGRAMS, gradients._STATES = everything
