"""The loss of a denoiser: noise on an image, the prediction, and its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import DiffusionConfig

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From (noisy ``[B, C, H, W]``, timestep ``[B]``, labels ``[B]``) to the prediction."""


class DenoisingLoss:
    r"""The loss of each image of a batch.

    On DDPM's chain, t is uniform, :math:`x_t = a x_0 + b\,\epsilon` with :math:`a^2 = \bar\alpha_t = 1 - b^2`, and the
    loss is the squared error of :math:`\epsilon`, or of :math:`v = a\,\epsilon - b\,x_0`. With a learned sigma, the
    term of the variational bound at t is added, in bits per number; only the variance learns through it (arXiv
    2102.09672, equation 16: the weight 0.001 times 1000 steps is 1 for a single step). For a flow,
    :math:`x_\sigma = (1 - \sigma) x_0 + \sigma\,\epsilon`, and the loss is the squared error of
    :math:`\epsilon - x_0`.

    The scheduler is :func:`~gspn.tasks.diffusion.schedulers.training_scheduler` of the configuration.
    """

    def __init__(self, config: DiffusionConfig, scheduler: Any) -> None:
        self.config, self.scheduler = config, scheduler
        if config.objective != "flow":
            alphas = scheduler.alphas_cumprod.double()
            before = torch.cat([alphas.new_ones(1), alphas[:-1]])
            betas = 1 - alphas / before
            posterior = betas * (1 - before) / (1 - alphas)
            # The variance of the first step is zero; that of the next one replaces it, as in arXiv 2102.09672.
            self.log_smallest = torch.cat([posterior[1:2], posterior[1:]]).log()
            self.log_largest = betas.log()
            self.mean_of_start = betas * before.sqrt() / (1 - alphas)
            self.mean_of_noisy = (1 - before) * (1 - betas).sqrt() / (1 - alphas)
            self.alphas = alphas

    def each(self, predict: Predict, start: Tensor, labels: Tensor) -> Tensor:
        """The loss ``[B]`` of each of clean images or latents ``[B, C, H, W]`` with their labels ``[B]``.

        Times and noise are sampled from PyTorch's global generators.
        """
        if self.config.objective == "flow":
            return self._flow(predict, start, labels)
        steps = self.config.timesteps
        # On the CPU, so that the times do not depend on the device of the model.
        t = torch.randint(0, steps, (len(start),)).to(start.device)
        noise = torch.randn_like(start)
        noisy = self.scheduler.add_noise(start, noise, t)
        predicted = predict(noisy, t, labels).float()  # [B, C or 2 C, H, W]
        if self.config.objective == "v_prediction":
            return _mean((predicted - self.scheduler.get_velocity(start, noise, t)).square())
        if not self.config.learned_sigma:
            return _mean((predicted - noise).square())
        predicted, variance = predicted.chunk(2, dim=1)
        bound = self._bound(start, noisy, predicted.detach(), variance, t)
        return _mean((predicted - noise).square()) + bound

    def _flow(self, predict: Predict, start: Tensor, labels: Tensor) -> Tensor:
        times = torch.randn(len(start)).sigmoid() if self.config.sampling == "logit_normal" else torch.rand(len(start))
        sigma = times.to(start)
        noise = torch.randn_like(start)
        at = sigma[:, None, None, None]
        noisy = (1 - at) * start + at * noise
        predicted = predict(noisy, sigma * self.config.timesteps, labels).float()
        return _mean((predicted - (noise - start)).square())

    def _bound(self, start: Tensor, noisy: Tensor, noise: Tensor, variance: Tensor, t: Tensor) -> Tensor:
        """The term of the bound at t in bits per number, ``[B]``; ``noise`` and ``variance`` are predicted."""

        def at(values: Tensor) -> Tensor:
            return values.to(start.device)[t].to(start.dtype)[:, None, None, None]

        alpha = at(self.alphas)
        guess = (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        true_mean = at(self.mean_of_start) * start + at(self.mean_of_noisy) * noisy
        mean = at(self.mean_of_start) * guess + at(self.mean_of_noisy) * noisy
        smallest, largest = at(self.log_smallest), at(self.log_largest)
        part = (variance + 1) / 2
        log_variance = part * largest + (1 - part) * smallest
        ratio, error = smallest - log_variance, (true_mean - mean).square()
        divergence = 0.5 * (ratio.exp() - ratio - 1 + error / log_variance.exp())
        # The last step yields one of 256 levels, so its term is the likelihood of a level instead of a density's.
        likelihood = -_log_likelihood(start, mean, 0.5 * log_variance)
        return _mean(torch.where((t == 0)[:, None, None, None], likelihood, divergence)) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The log-probability of the level of x, one of 256 in [-1, 1]; the outer levels include the tails."""
    inverse = (-log_std).exp()
    upper = torch.special.ndtr((x + 1 / 255 - mean) * inverse)
    lower = torch.special.ndtr((x - 1 / 255 - mean) * inverse)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
