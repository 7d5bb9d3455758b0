"""The figures against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from gspn._errors import UsageError
from gspn.tasks.diffusion.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)


def normal(count, mean, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    # Exactly these moments, so that the closed form is exact too.
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return x * torch.tensor(scale, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_gaussians():
    a, b = normal(200, [0, 0, 1], [1, 2, 3]), normal(300, [1, 0, -1], [2, 2, 0.5], seed=1)
    expected = 1 + 4 + sum((s - t) ** 2 for s, t in ((1, 2), (2, 2), (3, 0.5)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_with_fewer_images_than_features():
    a = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(a, a + 1) == pytest.approx(40, rel=1e-3)


def test_kernel_distance_by_its_definition():
    a, b = normal(12, [0.0, 0], [1, 1]), normal(12, [1.0, 0], [1, 2], seed=1)

    def kernel(x, y):
        return (x @ y.T / 2 + 1) ** 3

    n = len(a)
    off = ~torch.eye(n, dtype=torch.bool)
    expected = kernel(a, a)[off].mean() + kernel(b, b)[off].mean() - 2 * kernel(a, b).mean()
    mean, deviation = kernel_distance(a, b, subsets=3, subset_size=12)
    assert mean == pytest.approx(expected.item(), rel=1e-4)
    assert deviation == pytest.approx(0, abs=1e-4)
    state = torch.get_rng_state()
    assert kernel_distance(a, b, subset_size=5) == kernel_distance(a, b, subset_size=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_inception_score_of_sure_and_of_unsure():
    sure = torch.eye(5).repeat(20, 1) * 50
    assert inception_score(sure, splits=1)[0] == pytest.approx(5, rel=1e-3)
    assert inception_score(torch.zeros(30, 5))[0] == pytest.approx(1, rel=1e-3)
    one = torch.zeros(30, 5)
    one[:, 2] = 50
    assert inception_score(one)[0] == pytest.approx(1, rel=1e-3)


def test_precision_and_recall_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(30, 2, generator=generator)
    fake = torch.randn(20, 2, generator=generator) * 0.5 + 0.7

    def share(points, manifold):
        inside = 0
        for p in points.tolist():
            for i, m in enumerate(manifold.tolist()):
                others = sorted(math.dist(m, o) for j, o in enumerate(manifold.tolist()) if j != i)
                if math.dist(p, m) <= others[2]:
                    inside += 1
                    break
        return inside / len(points)

    expected = share(fake, real), share(real, fake)
    assert expected[0] > expected[1] > 0
    for chunk in (2048, 7):
        assert precision_recall(real, fake, chunk=chunk) == pytest.approx(expected)


def test_memorised_samples_are_precise_and_do_not_cover():
    real = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(real, real[:8])
    assert precision == 1 and recall < 1


def test_nearest():
    points = torch.tensor([[0.0], [10.0]])
    distances, indices = nearest(points, torch.tensor([[1.0], [9.0], [4.0]]), k=2)
    assert indices.tolist() == [[0, 2], [1, 2]]
    assert distances.tolist() == [[1, 4], [1, 6]]


def test_too_few_images():
    with pytest.raises(UsageError, match="two images"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(UsageError, match="more than 3"):
        precision_recall(torch.zeros(3, 3), torch.zeros(5, 3))
