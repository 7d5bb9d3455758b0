"""The rule that refuses an inaccurate implementation."""

from __future__ import annotations

import pytest
import torch

from gspn.bench.accuracy_check import Accuracy, CheckFailedError, compare, require_accurate

EPS = torch.finfo(torch.float32).eps


def accuracy(result: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor):
    (one,) = compare({"h": result}, {"h": plain}, {"h": exact})
    return one


def test_accepts_twice_the_plain_error_and_not_more():
    exact = torch.ones(5, dtype=torch.float64)
    plain = torch.full((5,), 1.001)
    assert accuracy(torch.full((5,), 1.0019), plain, exact).ok
    assert not accuracy(torch.full((5,), 1.0021), plain, exact).ok
    assert accuracy(torch.full((5,), 0.9981), plain, exact).ok


def test_accepts_a_few_roundings_where_plain_is_exact():
    exact = torch.tensor([1.0, 0.01], dtype=torch.float64)
    plain = exact.float()
    assert accuracy(torch.tensor([1.0 + 3 * EPS, 0.01]), exact.float().double().float(), exact).ok
    assert not accuracy(torch.tensor([1.0 + 8 * EPS, 0.01]), plain, exact).ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_results_that_are_not_finite_are_refused(bad):
    exact = torch.ones(3, dtype=torch.float64)
    assert not accuracy(torch.tensor([1.0, bad, 1.0]), exact.float(), exact).ok


def test_float64_is_compared_with_itself():
    exact = torch.ones(3, dtype=torch.float64)
    eps = torch.finfo(torch.float64).eps
    assert accuracy(exact + 20 * eps, exact, exact).ok
    assert not accuracy(exact + 50 * eps, exact, exact).ok


def test_nothing_to_compare_is_accepted():
    assert accuracy(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64)).ok


def test_the_error_names_each_inaccurate_result():
    good, bad = Accuracy("y", 0.1, 0.1, 0.2), Accuracy("dx", 1.0, 0.1, 0.2)
    require_accurate({"one": [good], "two": []})
    with pytest.raises(CheckFailedError, match=r"^two: dx is off by 1, and 0\.2 is accepted$"):
        require_accurate({"one": [good], "two": [good, bad]})
