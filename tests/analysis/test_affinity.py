"""The explicit matrix: what it says of the operator, and that it refuses what it cannot express."""

from __future__ import annotations

import pytest
import torch

import gspn
from gspn.analysis import affinity_matrix


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_rows_of_every_product_sum_to_one(direction: str) -> None:
    # The Stability-Context Condition: each W_ij is row-stochastic, so a row of G sums to the number of lines before it.
    taps = gspn.stochastic_taps(torch.randn(1, 2, 3, 4, 5, dtype=torch.float64), direction=direction)
    matrix = affinity_matrix(taps, direction=direction).unflatten(-1, (4, 5)).unflatten(-3, (4, 5))
    line, cross = (-2, -1) if direction in ("down", "up") else (-1, -2)
    sums = matrix.sum(cross)  # over the positions of each source line: [B, C, H, W, lines]
    for i in range(4):
        for j in range(5):
            at = i if line == -2 else j
            lines = sums.shape[-1]
            step = lines - 1 - at if direction in ("up", "left") else at
            expected = torch.zeros(lines, dtype=torch.float64)
            reached = range(at, lines) if direction in ("up", "left") else range(at + 1)
            expected[list(reached)] = 1
            assert len(list(reached)) == step + 1
            torch.testing.assert_close(sums[0, 0, i, j], expected)


def test_entries_are_not_negative_and_the_four_directions_connect_every_pair() -> None:
    matrices = []
    for direction in gspn.DIRECTIONS:
        taps = gspn.stochastic_taps(torch.randn(1, 1, 3, 5, 5, dtype=torch.float64), direction=direction)
        matrices.append(affinity_matrix(taps, direction=direction))
    assert all((m >= 0).all() for m in matrices)
    assert (sum(matrices) > 0).all()


def test_a_segment_cuts_the_matrix_into_blocks() -> None:
    taps = gspn.stochastic_taps(torch.randn(1, 1, 3, 5, 2, dtype=torch.float64), direction="down")
    matrix = affinity_matrix(taps, direction="down", segment=2)[0, 0].reshape(5, 2, 5, 2).abs().sum((1, 3)) > 0
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool
    )
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize(
    ("taps", "lam", "direction", "segment", "message"),
    [
        (torch.zeros(1, 1, 2, 4, 4), None, "down", None, r"taps.shape=torch.Size\(\[1, 1, 2, 4, 4\]\)"),
        (torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 3, 4, 4), "down", None, r"lam.shape=torch.Size\(\[1, 3, 4, 4\]\)"),
        (torch.zeros(1, 1, 3, 4, 4), None, "north", None, "direction='north'"),
        (torch.zeros(1, 1, 3, 4, 4), None, "down", 0, "segment=0"),
    ],
)
def test_errors_show_the_value(taps, lam, direction, segment, message) -> None:
    with pytest.raises(ValueError, match=message):
        affinity_matrix(taps, lam, direction, segment)
