"""Metrics of how alike two sets of images are, from their features: torchmetrics' own where it has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._errors import UsageError, require


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    r"""The Fréchet distance between Gaussians fitted to two sets of features (FID; sFID for spatial features).

    .. math:: \|\mu_1 - \mu_2\|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    The features are ``[N, D]`` and ``[M, D]``, of two images at least.

    Example:
        >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(frechet_distance(x, x + torch.tensor([2.0, 0, 0])), 6)
        4.0
    """
    inputs: Any = nn.Identity()  # which are features already
    inputs.num_features = real.shape[1]
    # Here and below: every process has all features, and torchmetrics would add those of the others again.
    metric = require("torchmetrics.image.fid").FrechetInceptionDistance(feature=inputs, sync_on_compute=False)
    metric.set_dtype(torch.float64)
    _update(metric, real, fake)
    return max(float(metric.compute()), 0.0)  # rounding may leave the distance of a set to itself below zero


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The kernel distance (KID): the unbiased squared MMD with a cubic kernel, mean and deviation over random subsets.

    The features are ``[N, D]`` and ``[M, D]``; a subset has ``subset_size`` images, or all if there are fewer.
    """
    size = min(subset_size, len(real), len(fake))
    with _seeded(seed):
        metric = require("torchmetrics.image.kid").KernelInceptionDistance(
            feature=nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False
        )
        _update(metric, real, fake)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """The inception score (IS), mean and deviation over parts: how sure a classifier is, and of how many classes.

    The logits are ``[N, K]``; in an order that depends on the seed, they are split into parts, N at most.
    """
    with _seeded(seed):
        metric = require("torchmetrics.image.inception").InceptionScore(
            feature=nn.Identity(), splits=min(splits, len(logits)), sync_on_compute=False
        )
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return float(mean), float(torch.nan_to_num(deviation))


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, chunk: int = 2048) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): the share of each set that lies in the other's manifold.

    The manifold of a set is the union of balls around its images; each reaches to the ``k``-th nearest neighbour. The
    sets are ``[N, D]`` and ``[M, D]``, of more than ``k`` images each; ``chunk`` rows of distances are kept at a time.

    Returns:
        The share of ``fake`` in the manifold of ``real``, and that of ``real`` in the manifold of ``fake``.

    Example:
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> precision_recall(x, x), precision_recall(x, x + 100)
        ((1.0, 1.0), (0.0, 0.0))
    """
    if min(len(real), len(fake)) <= k:
        raise UsageError(f"precision and recall need more than {k} images; there are {len(real)} and {len(fake)}.")
    real, fake = real.double(), fake.double()

    def covered(points: Tensor, manifold: Tensor) -> float:
        radii = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(chunk)])
        inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(chunk)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real), covered(real, fake)


def nearest(points: Tensor, among: Tensor, *, k: int, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of ``among [N, D]`` to each of ``points [M, D]``: distances and indices ``[M, k]``."""
    parts = [torch.cdist(part.double(), among.double()).topk(k, largest=False) for part in points.split(chunk)]
    return torch.cat([one.values for one in parts]), torch.cat([one.indices for one in parts])


def _update(metric: Any, real: Tensor, fake: Tensor) -> None:
    if min(len(real), len(fake)) < 2:
        raise UsageError(f"a distance needs at least two images of each set; there are {len(real)} and {len(fake)}.")
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With a seed for the subsets, and without the warning that features are kept in memory, where they are anyway."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield
