"""Runs the kernels on the CPU; test_interpreter.py calls this in processes that have TRITON_INTERPRET=1 set.

Every tensor that the launcher allocates is filled with NaN first: an element that no program writes shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gspn
from support import LAYOUTS, assert_as_exact_as_pytorch, make_inputs


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        new = allocate(*args, **kwargs)
        return new.fill_(float("nan")) if new.is_floating_point() else new  # Triton copies the sizes of images

    return allocate_poisoned


def _poison() -> None:
    torch.empty_like = _poisoned(torch.empty_like)
    torch.empty_strided = _poisoned(torch.empty_strided)
    Tensor.new_empty = _poisoned(Tensor.new_empty)  # type: ignore[method-assign]


def check(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor], direction: str, segment: int | None, row: int | None = None
) -> None:
    """Forward and every gradient against float64, by the rule that all implementations follow.

    ``row`` is the length from which a row takes more than one block.
    """
    from gspn.ops import reference
    from gspn.ops.triton import line_scan as kernels
    from gspn.ops.triton.planner import Limits

    x, taps, lam, grad = tensors
    limits = Limits(row=row)
    h = reference.line_scan(x, taps, lam, direction, segment)
    how = (direction, segment, True, lam is not None)
    actual = [
        kernels.line_scan(x, taps, lam, direction, segment, limits=limits),
        *kernels.line_scan_backward(grad, h, None if lam is None else x, taps, lam, *how, limits=limits),
    ]
    plain = [h, *reference.line_scan_backward(grad, h, None if lam is None else x, taps, lam, *how)]

    def exactly(change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        a, w, gate, g, state = (None if t is None else change(t.double()) for t in (x, taps, lam, grad, h))
        scanned = reference.line_scan(a, w, gate, direction, segment)
        return [scanned, *reference.line_scan_backward(g, state, None if lam is None else a, w, gate, *how)]

    exact, magnitude = exactly(lambda t: t), exactly(torch.abs)
    for name, *results in zip(("h", "dx", "dtaps", "dlam"), actual, plain, exact, magnitude, strict=True):
        if results[1] is not None:
            assert_as_exact_as_pytorch(*results, f"{name} {direction=} {segment=} {x.shape=} {taps.shape=} {x.dtype=}")


def combinations() -> None:
    # Sizes without a common factor: over 35 cases every two of the first four axes meet in all their values.
    shapes = [(1, 1), (1, 5), (7, 1), (3, 4), (9, 6)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    layouts = [*LAYOUTS, "expanded_channels"]
    for i in range(35):
        shape, layout, dtype, direction = shapes[i % 5], layouts[i % 7], dtypes[i % 3], gspn.DIRECTIONS[i % 4]
        groups, segment = (4, 2, 1)[i // 3 % 3], (None, 1, 2, 4)[i // 4 % 4]
        x, taps, lam, grad = make_inputs(1 + i % 9 // 8, 4, *shape, groups, dtype, layout=layout)
        check((x, taps, None if i // 2 % 3 == 0 else lam, grad), direction, segment)
    # A gradient of a sum has stride 0 everywhere; the other tensors decide how memory is walked.
    for direction in ("down", "left"):
        x, taps, lam, _ = make_inputs(1, 2, 3, 4, 2, torch.float32)
        check((x, taps, lam, torch.ones(()).expand_as(x)), direction, None)
    check(make_inputs(2, 5, 4, 3, 1, torch.float32), "up", 2)


def runs_of_segments() -> None:
    # More lines than one program takes: 35 of 7 for most layouts, 56 where it takes tiles of 8.
    check(make_inputs(1, 2, 40, 3, 1, torch.float32), "up", 7)
    check(make_inputs(1, 2, 3, 60, 2, torch.float32), "right", 7)
    check(make_inputs(1, 2, 3, 61, 2, torch.float32), "left", 7)
    check(make_inputs(1, 2, 3, 40, 1, torch.bfloat16), "left", 16)
    check(make_inputs(1, 2, 3, 38, 2, torch.float32, layout="channels_last"), "left", 3)


def _shape(direction: str, lines: int, cross: int) -> tuple[int, int]:
    return (lines, cross) if direction in ("down", "up") else (cross, lines)


def long_rows() -> None:
    for i, direction in enumerate(gspn.DIRECTIONS):
        if i % 3 == 0:
            check(make_inputs(1, 2, *_shape(direction, 3, 40), 2, torch.float32), direction, None, row=32)
        else:
            check(make_inputs(1, 3, *_shape(direction, 3, 40), 1, torch.bfloat16), direction, 2, row=32)
        inputs = make_inputs(1, 3, *_shape(direction, 3, 39), 3, torch.float32, layout="channels_last")
        check(inputs, direction, (2, None)[i // 2 == i % 2], row=32)


def long_rows_in_many_lines() -> None:
    # More lines than a block's halo is wide, so that states cross from one round of blocks to the next.
    check(make_inputs(1, 1, 19, 40, 1, torch.float32), "up", None, row=32)
    check(make_inputs(1, 1, 40, 18, 1, torch.float32), "left", None, row=32)
    check(make_inputs(1, 1, 36, 20, 1, torch.float16), "right", 11, row=32)
    check(make_inputs(1, 4, 36, 10, 4, torch.float32, layout="channels_last"), "left", None, row=32)


def taps_that_point_nowhere() -> None:
    from gspn.ops.triton import line_scan as kernels
    from gspn.ops.triton.planner import Limits

    variants = ((None, 4, None, "nan"), (2, 4, None, "inf"), (2, 36, 32, "nan"))
    for i in range(6):
        direction, (segment, cross, row, value) = gspn.DIRECTIONS[i % 4], variants[i % 3]
        x, taps, lam, grad = make_inputs(1, 1, *_shape(direction, 3, cross), 1, torch.float32)
        vertical, forwards = direction in ("down", "up"), direction in ("down", "right")
        nowhere = torch.zeros(1, 1, 3, 3, cross, dtype=torch.bool)  # [B, G, 3, lines in scan order, cross]
        nowhere[:, :, 0, :, 0] = nowhere[:, :, 2, :, -1] = True
        nowhere[:, :, :, :: segment or 3] = True
        nowhere = nowhere if forwards else nowhere.flip(3)
        nowhere = nowhere if vertical else nowhere.mT
        results, limits = [], Limits(row=row)
        for number in (float(value), 0.0):
            w = taps.masked_fill(nowhere, number)
            h = kernels.line_scan(x, w, lam, direction, segment, limits=limits)
            grads = kernels.line_scan_backward(grad, h, x, w, lam, direction, segment, True, True, limits=limits)
            results.append([h, *grads])
        for poisoned, clean in zip(*results, strict=True):
            assert clean.isfinite().all()
            assert torch.equal(poisoned, clean), (direction, segment, cross, value)
        assert results[0][2][nowhere].eq(0).all()


def through_the_operator() -> None:
    x, taps, lam, grad = make_inputs(1, 2, 3, 4, 1, torch.float32)
    results = []
    for impl in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, taps, lam)]
        h = gspn.line_scan(*leaves, direction="left", segment=2, impl=impl)
        firsts = torch.autograd.grad(h, leaves, grad, create_graph=True)
        seconds = torch.autograd.grad(sum((g * g).sum() for g in firsts), leaves)
        results.append([h, *firsts, *seconds])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert gspn.available_impls(x, op="line_scan")["triton"] is None


def only_what_is_needed() -> None:
    from gspn.ops import reference
    from gspn.ops.triton import line_scan as kernels

    x, taps, lam, grad = make_inputs(1, 2, 3, 4, 1, torch.float32)
    for direction, need_taps, need_lam in (
        ("down", False, False), ("left", False, True), ("left", True, False), ("down", True, True)
    ):  # fmt: skip
        h = reference.line_scan(x, taps, lam, direction, None)
        how = (direction, None, need_taps, need_lam)
        arguments = (grad, h, x if need_lam else None, taps, lam)
        actual = kernels.line_scan_backward(*arguments, *how)
        expected = reference.line_scan_backward(*arguments, *how)
        for a, b in zip(actual, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def empty() -> None:
    from gspn.ops.triton import line_scan as kernels

    for shape in [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)]:
        x, taps = torch.ones(shape), torch.ones(shape[0], 1, 3, *shape[2:])
        assert kernels.line_scan(x, taps, x, "down", None).shape == shape
        dx, dtaps, dlam = kernels.line_scan_backward(x, x, x, taps, x, "down", None, True, True)
        assert (dx.shape, dtaps.shape, dlam.shape) == (shape, taps.shape, shape)


def _prepare_language_once() -> None:
    """Prepare Triton's language when a kernel starts, not again for each function: that is half of the time."""
    from triton.runtime.interpreter import InterpretedFunction

    call = InterpretedFunction.__call__

    def call_prepared(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        # Triton's own functions see its language by other names.
        prepared = self.fn.__module__.startswith("gspn.")
        return self.rewrite()(*args, **kwargs) if prepared else call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_prepared  # type: ignore[method-assign]


def run(functions: list[Callable[[], None]]) -> None:
    """Call the functions with everything prepared."""
    torch.set_num_threads(1)
    _poison()
    _prepare_language_once()
    for function in functions:
        function()
