"""Metrics against torchmetrics and against loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.regression import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError

from gspn.tasks.dense.metrics import DISTANCES, ClassSums, NumberSums, near_border, range_names


def maps(seed=0, classes=4, size=(40, 50)):
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(classes, (1, 1, 5, 6), generator=rng).float()
    target = torch.nn.functional.interpolate(coarse, size, mode="nearest")[0, 0]
    predicted = torch.where(torch.rand(size, generator=rng) < 0.7, target, torch.randint(classes, size, generator=rng))
    target[:3] = torch.nan
    return predicted.long(), target


def test_scores_of_classes_are_those_of_torchmetrics():
    sums, index = ClassSums(6), MulticlassJaccardIndex(6, average="none")
    right = total = 0
    for seed in range(3):
        predicted, target = maps(seed)
        sums.add(predicted, target)
        known = ~target.isnan()
        index.update(predicted[known], target[known].long())
        right, total = right + int((predicted == target).sum()), total + int(known.sum())
    scores = sums.scores(sums.sums.tolist())
    expected = 100 * index.compute()
    assert scores.iou[4:] == (None, None)  # neither there nor predicted
    assert list(scores.iou[:4]) == pytest.approx(expected[:4].tolist(), rel=1e-5)
    assert scores.miou == pytest.approx(float(expected[:4].mean()), rel=1e-5)
    assert scores.accuracy == pytest.approx(100 * right / total)
    assert (scores.pixels, sum(map(sum, scores.confusion))) == (total, total)


def test_the_distance_from_a_border_is_that_of_a_loop():
    _, target = maps(5, size=(24, 30))
    values = target.numpy()
    distances = (1, 2, 4, 8, 11)
    for distance, near in zip(distances, near_border(target, distances), strict=True):
        expected = np.zeros(values.shape, bool)
        for i, j in np.ndindex(*values.shape):
            around = values[max(i - distance, 0) : i + distance + 1, max(j - distance, 0) : j + distance + 1]
            known = around[~np.isnan(around)]
            expected[i, j] = not math.isnan(values[i, j]) and bool((known != values[i, j]).any())
        # Two others within the distance are enough for a pixel that is ignored itself, and it does not count.
        assert np.array_equal(near.numpy(), expected)


def test_accuracy_by_distance_counts_each_pixel_once():
    target = torch.zeros(8, 200)
    target[:, 100:] = 1
    predicted = target.long()
    predicted[:, 97:103] = 1 - predicted[:, 97:103]  # wrong up to three pixels from the border
    sums = ClassSums(2)
    sums.add(predicted, target)
    scores = sums.scores(sums.sums.tolist())
    assert scores.by_distance == {"1": 0, "2": 0, "3-4": 50, "5-8": 100, "9-16": 100, "17-32": 100, "over 32": 100}
    counts = sums.sums[4::2].tolist()
    assert sum(counts) == target.numel() and len(counts) == len(DISTANCES) + 1 == len(range_names())


def test_scores_of_numbers_are_those_of_torchmetrics():
    rng = torch.Generator().manual_seed(0)
    target = 1 + 100 * torch.rand(30, 40, generator=rng)
    predicted = target * (0.7 + 0.6 * torch.rand(30, 40, generator=rng))
    known = torch.rand(30, 40, generator=rng) < 0.8
    sums = NumberSums()
    sums.add(predicted, target.masked_fill(~known, torch.nan))
    scores = sums.scores(sums.sums.tolist())
    one, other = predicted[known], target[known]
    assert scores.mae == pytest.approx(float(MeanAbsoluteError()(one, other)), rel=1e-5)
    assert scores.rmse == pytest.approx(float(MeanSquaredError(squared=False)(one, other)), rel=1e-5)
    assert scores.abs_rel == pytest.approx(float(MeanAbsolutePercentageError()(one, other)), rel=1e-5)
    ratio = torch.maximum(one / other, other / one)
    assert scores.delta1 == pytest.approx(100 * float((ratio < 1.25).float().mean()), rel=1e-5)
    assert scores.pixels == int(known.sum())


def test_relative_errors_leave_small_numbers_out():
    sums = NumberSums()
    sums.add(torch.tensor([[5.0, 12.0, -8.0]]), torch.tensor([[0.0, 10.0, 10.0]]))
    scores = sums.scores(sums.sums.tolist())
    assert scores.abs_rel == pytest.approx((0.2 + 1.8) / 2)
    assert scores.delta1 == 50  # another sign is never close
    empty = NumberSums()
    empty.add(torch.zeros(1, 2), torch.full((1, 2), torch.nan))
    assert empty.scores(empty.sums.tolist()).pixels == 0
