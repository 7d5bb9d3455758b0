"""The losses against their definitions, by independent means."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gspn.tasks.class_conditional import DiffusionConfig
from gspn.tasks.diffusion.losses import DenoisingLoss, _log_likelihood
from gspn.tasks.diffusion.schedulers import training_scheduler


def loss_of(**options):
    config = DiffusionConfig(**{"learned_sigma": False, **options})
    return DenoisingLoss(config, training_scheduler(config, pixels=True))


START = torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(6)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_prediction_has_no_loss(objective, sampling):
    loss = loss_of(objective=objective, sampling=sampling)
    seen = []

    def predict(noisy, t, labels):
        assert torch.equal(labels, LABELS)
        seen.append(t)
        if objective == "flow":
            at = (t / 1000)[:, None, None, None]
            return (noisy - START) / at  # noise - start
        alpha = loss.alphas[t].to(START)[:, None, None, None]
        noise = (noisy - alpha.sqrt() * START) / (1 - alpha).sqrt()
        return noise if objective == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * START

    torch.manual_seed(1)
    assert loss.each(predict, START, LABELS).mean().item() < 1e-6
    # One that is off by one everywhere is off by one.
    assert loss.each(lambda *a: predict(*a) + 1, START, LABELS).mean().item() == pytest.approx(1, abs=1e-3)
    assert len(torch.cat(seen).unique()) > 6


def test_the_bound_is_the_divergence_of_the_posterior():
    loss = loss_of(learned_sigma=True, timesteps=50)
    torch.manual_seed(0)
    start, noise, guess, variance = (torch.randn(4, 1, 3, 3).double() for _ in range(4))
    t = torch.tensor([1, 5, 20, 49])
    noisy = loss.scheduler.add_noise(start, noise, t)
    found = loss._bound(start, noisy, guess, variance, t)

    alphas = loss.scheduler.alphas_cumprod.double()
    expected = []
    for i, step in enumerate(t.tolist()):
        a, before = alphas[step], alphas[step - 1]
        beta = 1 - a / before
        posterior = beta * (1 - before) / (1 - a)

        def mean(x0, i=i, a=a, before=before, beta=beta):
            return before.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - a) * noisy[i]

        x0 = (noisy[i] - (1 - a).sqrt() * guess[i]) / a.sqrt()
        part = (variance[i] + 1) / 2
        predicted = (part * beta.log() + (1 - part) * posterior.log()).exp()
        divergence = kl_divergence(Normal(mean(start[i]), posterior.sqrt()), Normal(mean(x0), predicted.sqrt()))
        expected.append(divergence.mean() / math.log(2))
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_variance_is_read_as_diffusers_reads_it():
    loss = loss_of(learned_sigma=True)
    raw = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for step in (2, 500, 999):
        theirs = loss.scheduler._get_variance(step, predicted_variance=raw)
        part = (raw + 1) / 2
        ours = part * loss.log_largest[step] + (1 - part) * loss.log_smallest[step]
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-4)


def test_levels_have_probabilities_that_sum_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_std in ((0.1, -3.0), (-0.99, -4.0), (2.0, 0.0)):
        total = _log_likelihood(levels, torch.full_like(levels, mean), torch.full_like(levels, log_std)).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-6)


def test_the_bound_teaches_the_variance_alone():
    loss = loss_of(learned_sigma=True)
    weight = torch.zeros(2, requires_grad=True)

    def predict(noisy, t, labels):
        noise = torch.full_like(noisy, 0.3) * (1 + weight[0])
        return torch.cat([noise, torch.zeros_like(noisy) + weight[1]], dim=1)

    torch.manual_seed(0)
    gradient = torch.autograd.grad(loss.each(predict, START, LABELS).mean(), weight)[0]
    torch.manual_seed(0)
    plain = loss_of(learned_sigma=False)
    alone = torch.autograd.grad(plain.each(lambda *a: predict(*a).chunk(2, 1)[0], START, LABELS).mean(), weight)[0]
    assert gradient[0] == pytest.approx(alone[0].item(), rel=1e-5)
    assert gradient[1].abs() > 0 and alone[1] == 0
