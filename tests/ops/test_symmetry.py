"""What must not change the result: flips, transposes, the rest of the batch, threads, running it again."""

from __future__ import annotations

import pytest
import torch

import gspn
from support import CPU_IMPLS, DTYPES, every_pair, make_inputs, scan_and_gradients, threads

FLIPPED = {"down": "up", "up": "down", "right": "left", "left": "right"}
TRANSPOSED = {"down": "right", "right": "down", "up": "left", "left": "up"}


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_flip_along_the_scan_exchanges_opposite_directions(impl, direction) -> None:
    x, taps, lam, grad = make_inputs(2, 4, 9, 11, 2, torch.float64)
    axis = -2 if direction in ("down", "up") else -1
    here = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=4, impl=impl)
    flipped = [t.flip(axis) for t in (x, taps, lam, grad)]
    there = scan_and_gradients(*flipped, direction=FLIPPED[direction], segment=4, impl=impl)
    for name in here:
        torch.testing.assert_close(there[name].flip(axis), here[name])


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_flip_across_the_scan_exchanges_the_outer_taps(impl, direction) -> None:
    x, taps, lam, grad = make_inputs(2, 4, 9, 11, 2, torch.float64)
    axis = -1 if direction in ("down", "up") else -2
    here = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=4, impl=impl)
    there = scan_and_gradients(
        x.flip(axis), taps.flip(axis, 2), lam.flip(axis), grad.flip(axis), direction=direction, segment=4, impl=impl
    )
    for name in here:
        back = there[name].flip(axis, 2) if name == "dtaps" else there[name].flip(axis)
        torch.testing.assert_close(back, here[name])


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_transposing_exchanges_rows_and_columns(impl, direction) -> None:
    x, taps, lam, grad = make_inputs(2, 4, 9, 11, 2, torch.float64)
    here = scan_and_gradients(x, taps, lam, grad, direction=direction, segment=4, impl=impl)
    there = scan_and_gradients(x.mT, taps.mT, lam.mT, grad.mT, direction=TRANSPOSED[direction], segment=4, impl=impl)
    for name in here:
        torch.testing.assert_close(there[name].mT, here[name])


@every_pair(impl=CPU_IMPLS, direction=gspn.DIRECTIONS, layout=["contiguous", "channels_last"], groups=[40, 1])
def test_an_image_does_not_depend_on_its_batch(impl, direction, layout, groups) -> None:
    tensors = make_inputs(3, 40, 9, 18, groups, torch.float32, layout=layout)
    whole = scan_and_gradients(*tensors, direction=direction, segment=4, impl=impl)
    alone = scan_and_gradients(*(t[1:2] for t in tensors), direction=direction, segment=4, impl=impl)
    for name in whole:
        assert torch.equal(whole[name][1:2], alone[name]), name


@every_pair(dtype=DTYPES, direction=gspn.DIRECTIONS, layout=["contiguous", "channels_last"], groups=[72, 1])
def test_the_same_bits_on_any_number_of_threads(dtype, direction, layout, groups) -> None:
    tensors = make_inputs(1, 72, 9, 18, groups, dtype, layout=layout)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results += [scan_and_gradients(*tensors, direction=direction, segment=2, impl="cpu") for _ in range(2)]
    for other in results[1:]:
        for name in other:
            assert torch.equal(results[0][name], other[name]), name
