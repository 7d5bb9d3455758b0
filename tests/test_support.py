"""The helpers that decide what the other tests see."""

from __future__ import annotations

import itertools

import pytest
import torch

from support import assert_as_exact_as_pytorch, pairwise


@pytest.mark.parametrize("sizes", [(1, 1), (4, 7, 4), (2, 4, 2, 2, 2, 4, 2), (4, 4, 6, 4), (1, 5, 1, 3)])
def test_pairwise_has_every_pair_in_few_rows_and_no_row_twice(sizes) -> None:
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    rows = pairwise(*axes)
    assert rows == pairwise(*axes)
    assert len(set(rows)) == len(rows)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(axes[i], axes[j]))
    assert {value for row in rows for value in row} == {value for axis in axes for value in axis}
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 1.5 * torch.tensor(largest).prod() + 1


def test_the_rule_for_right_allows_twice_the_error_of_plain_pytorch_and_no_more() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain, magnitude = exact.float() + 1e-3, exact.abs()
    assert_as_exact_as_pytorch(exact.float() - 1.9e-3, plain, exact, magnitude)
    with pytest.raises(AssertionError, match=r"plain PyTorch 0\.001"):
        assert_as_exact_as_pytorch(exact.float() - 2.1e-3, plain, exact, magnitude)
    with pytest.raises(AssertionError, match="stride"):
        assert_as_exact_as_pytorch(torch.zeros(2, 2).mT, torch.zeros(2, 2), torch.zeros(2, 2), magnitude)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_exact_as_pytorch(exact, plain, exact, magnitude)
