"""Runs the kernels over images of several sizes on the CPU; test_interpreter.py calls this with TRITON_INTERPRET=1 set.

The padding is filled with NaN. The plain results are those of each image alone by the specification.
"""

from __future__ import annotations

import torch
from propagate_support import NAMES, make_arguments
from torch import Tensor

import gspn
from support import make_inputs
from valid_size_cases import Results, alone, assert_equals_alone, poisoned, random_sizes

Size = tuple[int, int]

SIZES = [(6, 5), (0, 0), (1, 1), (5, 3), (2, 5)]


def _check_line_scan(
    tensors: tuple[Tensor, ...], sizes: list[Size], direction: str, segment: int | None, *, gated: bool = True,
    row: int | None = None,
) -> None:  # fmt: skip
    from gspn.ops import reference
    from gspn.ops.triton import line_scan as kernels
    from gspn.ops.triton.planner import Limits

    def scan(x, taps, lam, grad, h, *, module, **how) -> Results:
        state = module.line_scan(x, taps, lam, direction, segment, **how)
        grads = module.line_scan_backward(
            grad, state if h is None else h, None if lam is None else x, taps, lam, direction, segment, True,
            lam is not None, **how,
        )  # fmt: skip
        results = zip(("h", "dx", "dtaps", "dlam"), (state, *grads), strict=True)
        return {name: one for name, one in results if one is not None}

    x, taps, lam, grad = tensors
    maps = [x, taps, lam if gated else None, grad, None]
    maps[4] = scan(*maps, module=reference)["h"]
    filled = poisoned(maps, sizes, float("nan"))
    actual = scan(*filled, module=kernels, limits=Limits(row=row), valid_size=torch.tensor(sizes))
    plain = alone(lambda *own: scan(*own, module=reference), maps, sizes)
    doubles = [None if one is None else one.double() for one in maps]
    assert_equals_alone(actual, plain, alone(lambda *own: scan(*own, module=reference), doubles, sizes))


def line_scans() -> None:
    dtypes, layouts = [torch.float32, torch.bfloat16, torch.float16], ["contiguous", "channels_last", "transposed"]
    for i in range(8):
        direction, segment, groups = gspn.DIRECTIONS[i % 4], (None, 2)[i // 4], (2, 1)[i // 2 % 2]
        tensors = make_inputs(5, 2, 6, 5, groups, dtypes[(i + 1) % 3], layout=layouts[(i + i // 6) % 3])
        _check_line_scan(tensors, SIZES, direction, segment, gated=i % 5 != 0)


def long_line_scans() -> None:
    # Runs of whole segments, of which an image may have none.
    _check_line_scan(make_inputs(2, 2, 40, 2, 1, torch.float32), [(37, 2), (4, 1)], "up", 7)
    _check_line_scan(make_inputs(2, 1, 2, 60, 1, torch.float32), [(2, 37), (1, 1)], "left", 7)
    # Rows of several blocks, in more lines than their halo is wide.
    _check_line_scan(make_inputs(2, 1, 19, 40, 1, torch.float32), [(18, 33), (19, 3)], "up", None, row=32)
    _check_line_scan(make_inputs(1, 1, 40, 19, 1, torch.float32), [(33, 18)], "left", None, row=32)
    # More channels than a block that share their taps: each block leaves a sum of its own.
    _check_line_scan(make_inputs(2, 40, 2, 3, 1, torch.float32, layout="channels_last"), [(2, 2), (1, 3)], "down", None)


def _check_propagate(arguments: tuple, sizes: list[Size], *, row: int | None = None) -> None:
    from gspn.ops import reference
    from gspn.ops.triton import propagate as kernels
    from gspn.ops.triton.launch import limits_of

    grad, x, proxy, *rest = arguments
    limits = limits_of(grad.device)._replace(row=row)

    def run(grad, x, proxy, *, module, rest=rest, **how) -> Results:
        y = module.propagate(x, proxy, *rest, **how)
        grads = module.propagate_backward(grad, x, proxy, *rest, **how)
        return {name: one for name, one in zip(NAMES, (y, *grads), strict=True) if one is not None}

    maps = [grad, x, proxy]
    filled, how = poisoned(maps, sizes, float("nan")), {"module": kernels, "valid_size": torch.tensor(sizes)}
    actual = run(*filled, limits=limits, **how)
    in_turn = kernels.propagate(
        *filled[1:], *rest, limits=limits._replace(together=False), valid_size=how["valid_size"]
    )
    assert torch.equal(actual["y"], in_turn)
    plain = alone(lambda *own: run(*own, module=reference), maps, sizes)
    wide = [one.double() if isinstance(one, Tensor) else one for one in rest]
    doubles = [one.double() for one in maps]
    exact = alone(lambda *own: run(*own, module=reference, rest=wide), doubles, sizes, terms=True)
    assert_equals_alone(actual, plain, exact)


def propagates() -> None:
    sizes = [(3, 4), (0, 0), (2, 3)]
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        layout, segment = ("contiguous", "channels_last", "transposed")[i], (None, 2, None)[i]
        directions = (gspn.DIRECTIONS, ("up", "left"), ("right", "up"))[i]
        arguments = make_arguments(
            3, 2, 3, 5, (2, 8, 3)[i], (2, 1, 2)[i], dtype, layout=layout, segment=segment, skip=i != 2,
            directions=directions,
        )  # fmt: skip
        _check_propagate(arguments, sizes)
    # More channels than one block has; logits that need care.
    _check_propagate(make_arguments(2, 20, 2, 3, 3, 5, directions=("left",)), [(1, 3), (2, 2)])
    _check_propagate(make_arguments(2, 1, 3, 3, 1, 1, directions=("up",), logits=20.0), [(2, 3), (3, 2)])


def long_propagates() -> None:
    # Runs of segments; rows of several blocks, in more lines than their halo is wide.
    arguments = make_arguments(2, 1, 40, 2, 1, 1, directions=("up",), segment=5, layout="channels_last")
    _check_propagate(arguments, [(37, 1), (3, 2)])
    _check_propagate(make_arguments(1, 1, 10, 40, 1, 1, directions=("up",)), [(9, 33)], row=32)
    # Programs that take several tiles of pixels, and one direction after the other.
    from gspn.ops.triton import gradients

    everything = gradients._PROGRAMS, gradients._STATES
    gradients._PROGRAMS, gradients._STATES = 2, 0
    arguments = make_arguments(2, 3, 3, 18, 9, 1, torch.bfloat16, directions=("left", "down"), layout="channels_last")
    _check_propagate(arguments, [(3, 17), (2, 7)])
    gradients._PROGRAMS, gradients._STATES = everything


def forty_sizes() -> None:
    sizes = random_sizes(40, 3, 2)
    _check_line_scan(make_inputs(40, 1, 3, 2, 1, torch.float32), sizes, "up", 2)
    _check_propagate(make_arguments(40, 1, 3, 2, 1, 1, directions=("left",)), sizes)


def wild_sizes() -> None:
    # Sizes on a device are not checked: beyond the map they are the map's, and below 0 there is no image.
    from gspn.ops.triton import line_scan as scans
    from gspn.ops.triton import propagate as propagations

    wild = torch.tensor([(8, 2**31 + 1), (3, 7), (-3, 4), (4, 2**31 - 1 - 2**63)])
    within = wild.clamp(torch.tensor(0), torch.tensor([3, 4]))
    x, taps, lam, grad = make_inputs(4, 2, 3, 4, 1, torch.float32)
    outer, inner, proxy, *rest = make_arguments(4, 2, 3, 4, 2, 1, directions=gspn.DIRECTIONS, segment=2)
    results = []
    for sizes in (wild, within):
        of_scans = []
        for direction in gspn.DIRECTIONS:
            h = scans.line_scan(x, taps, lam, direction, 2, valid_size=sizes)
            grads = scans.line_scan_backward(grad, h, x, taps, lam, direction, 2, True, True, valid_size=sizes)
            of_scans += [h, *grads]
        y = propagations.propagate(inner, proxy, *rest, valid_size=sizes)
        grads = propagations.propagate_backward(outer, inner, proxy, *rest, valid_size=sizes)
        results.append([*of_scans, y, *(one for one in grads if one is not None)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def sizes_through_the_operator() -> None:
    x, taps, lam, grad = make_inputs(3, 2, 3, 4, 1, torch.float32)
    x, taps, lam, grad = poisoned([x, taps, lam, grad], [(3, 4), (1, 2), (2, 4)], float("nan"))
    results = []
    for impl in ("triton", "reference"):
        leaves = [one.clone().requires_grad_() for one in (x, taps, lam)]
        h = gspn.line_scan(*leaves, direction="left", segment=2, valid_size=[(3, 4), (1, 2), (2, 4)], impl=impl)
        firsts = torch.autograd.grad(h, leaves, grad, create_graph=True)
        results.append([h, *firsts, *torch.autograd.grad(sum((g * g).sum() for g in firsts), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
