"""How well images fit their texts: a linear map from sentences to image features, fitted on real pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import UsageError
from ..pipelines import minilm


@torch.no_grad()
def embed_sentences(texts: Sequence[str], *, batch_size: int = 128) -> Tensor:
    """Sentences as all-MiniLM-L6-v2 sees them, ``[N, 384]``: the mean over the tokens, of length one."""
    tokenizer, encoder = minilm()
    found = []
    for begin in range(0, len(texts), batch_size):
        given = tokenizer(list(texts[begin : begin + batch_size]), padding=True, truncation=True, return_tensors="pt")
        states = encoder(**given).last_hidden_state  # [B, L, 384]
        mask = given["attention_mask"][..., None].to(states)
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


@dataclass(frozen=True)
class TextScores:
    """What :meth:`TextScorer.score` found.

    Attributes:
        similarity: Cosine between an image's features and those that its text predicts, mean over the images.
        rank: Median place of an image's own text among all candidates, 1 for the first.
        top1: Share of the images whose own text is the first.
        top10: Share whose own is among the first ten.
        candidates: How many texts there were.
    """

    similarity: float
    rank: float
    top1: float
    top10: float
    candidates: int


class TextScorer:
    r"""A ridge regression from sentences to the features of their images, and how images and texts agree by it.

    With sentences :math:`s` (:func:`embed_sentences`) and features :math:`f` of real images, both centred and the
    features divided by their deviations,

    .. math:: \min_W \sum \|W s - f\|^2 + \alpha \|W\|^2

    with the :math:`\alpha` of the least error of generalised cross-validation. A small stand-in for CLIP that needs no
    network access: its figures compare only with those of the same features, fitted on the same images.

    Args:
        sentences: ``[N, E]``, a sentence may come again with another image and an image with another sentence.
        features: ``[N, D]`` of the images.

    Raises:
        UsageError: there are fewer than 2 pairs.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> texts = torch.randn(300, 8, generator=generator)
        >>> images = texts @ torch.randn(8, 20, generator=generator)
        >>> TextScorer(texts[:200], images[:200]).score(images[200:], texts[200:]).rank
        1.0
    """

    def __init__(self, sentences: Tensor, features: Tensor) -> None:
        if len(sentences) < 2:
            raise UsageError(f"the text score is fitted on {len(sentences)} pairs; it needs 2 at least.")
        x, y = sentences.double(), features.double()
        self.text_mean, self.mean = x.mean(0), y.mean(0)
        self.deviation = y.std(0).clamp(min=1e-6)
        x, y = x - self.text_mean, (y - self.mean) / self.deviation
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        uy = u.T @ y  # [E, D]
        left = (y.square().sum() - uy.square().sum()).clamp(min=0)  # beyond what any map can reach
        errors = []
        # Smaller ones only ever fit noise, larger ones predict the mean.
        self.alphas = (s[0].square() * torch.logspace(-6, 1, 36, dtype=torch.float64)).tolist()
        for alpha in self.alphas:
            kept = s.square() / (s.square() + alpha)
            residual = left + ((1 - kept)[:, None] * uy).square().sum()
            errors.append((residual / (1 - kept.sum() / len(x)).clamp(min=1e-9).square()).item())
        self.alpha = self.alphas[errors.index(min(errors))]
        self.weights = vh.T @ ((s / (s.square() + self.alpha))[:, None] * uy)  # [E, D]

    def predicted(self, sentences: Tensor) -> Tensor:
        """Features that sentences predict, centred and scaled, ``[N, D]`` float64."""
        return (sentences.double() - self.text_mean) @ self.weights

    def score(self, features: Tensor, sentences: Tensor, candidates: Tensor | None = None) -> TextScores:
        """How images agree with their sentences.

        Args:
            features: ``[N, D]``.
            sentences: ``[N, E]``, of each image its own.
            candidates: ``[M, E]``, further texts that an image may be taken for.
        """
        images = F.normalize((features.double() - self.mean) / self.deviation, dim=1)
        own = (images * F.normalize(self.predicted(sentences), dim=1)).sum(1)  # [N]
        texts = torch.unique(sentences if candidates is None else torch.cat([sentences, candidates]), dim=0)
        others = images @ F.normalize(self.predicted(texts), dim=1).T  # [N, M]
        # Its own text is among them, and rounding must not put it before itself.
        ranks = 1 + (others > own[:, None] + 1e-9).sum(1)
        return TextScores(
            similarity=own.mean().item(),
            rank=ranks.double().quantile(0.5).item(),
            top1=(ranks == 1).double().mean().item(),
            top10=(ranks <= 10).double().mean().item(),
            candidates=len(texts),
        )
