"""The kernels' own power of two, on which every tap rests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from gspn.ops.cpu import instruction_set, instruction_sets
from gspn.ops.cpu.library import load


def exp2(x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    code = {"float32": 0, "float64": 1}[x.dtype.name]
    load().gspn_exp2(
        ctypes.c_int32(code), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(x.size)
    )
    return y


@pytest.fixture(params=instruction_sets())
def isa(request) -> Iterator[None]:
    with instruction_set(request.param):
        yield


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("dtype", "most"), [(np.float32, 125), (np.float64, 1000)])
def test_error_below_two_units_in_the_last_place(dtype, most) -> None:
    if np.finfo(np.longdouble).eps >= np.finfo(dtype).eps:
        pytest.skip("no wider type here to compare with")
    spread = np.random.default_rng(0).uniform(-most, most, 300_001)
    near_integers = np.arange(-most, most)[:, None] + np.array([-1e-6, -1e-9, 0, 1e-9, 1e-6])
    x = np.concatenate([spread, np.linspace(-1, 1, 100_003), near_integers.ravel()]).astype(dtype)
    exact = np.exp2(x.astype(np.longdouble))
    error = np.abs(exp2(x) - exact) / np.spacing(exact.astype(dtype))
    assert error.max() < 2


@pytest.mark.usefixtures("isa")
def test_the_ends_of_the_range() -> None:
    x = np.array([-1e30, -np.inf, -2000, 0, 1, np.nan], dtype=np.float32)
    y = exp2(x)
    assert (y[:3] <= np.finfo(np.float32).tiny).all() and (y[:3] >= 0).all()
    assert y[3] == 1
    assert y[4] == 2
    # A NaN leads to the kernels' safe way, as an infinite or the largest number does.
    assert not y[5] < 1e37
