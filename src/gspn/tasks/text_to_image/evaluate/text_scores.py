"""Scores of how well images match their texts, by a linear map from sentences to image features."""

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
    """Embed sentences with all-MiniLM-L6-v2: the mean over the tokens, normalized, ``[N, 384]``."""
    tokenizer, encoder = minilm()
    parts = []
    for begin in range(0, len(texts), batch_size):
        tokens = tokenizer(list(texts[begin : begin + batch_size]), padding=True, truncation=True, return_tensors="pt")
        states = encoder(**tokens).last_hidden_state  # [B, L, 384]
        mask = tokens["attention_mask"][..., None].to(states)
        parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


@dataclass(frozen=True)
class TextScores:
    """The result of :meth:`TextScorer.score`.

    Attributes:
        similarity: Cosine between an image's features and those that its text predicts, mean over the images.
        rank: Median rank of an image's own text among all candidates; 1 is the best.
        top1: Share of the images whose own text ranks first.
        top10: Share of the images whose own text is among the first ten.
        candidates: The number of candidate texts.
    """

    similarity: float
    rank: float
    top1: float
    top10: float
    candidates: int


class TextScorer:
    r"""A ridge regression from sentences to image features, and the scores of images and texts by it.

    With sentences :math:`s` (:func:`embed_sentences`) and features :math:`f` of real images, both centred and the
    features divided by their deviations,

    .. math:: \min_W \sum \|W s - f\|^2 + \alpha \|W\|^2

    with the :math:`\alpha` that minimises the error of generalised cross-validation. It is a small stand-in for CLIP
    that needs no network access. Its scores can be compared only with those of the same features, fitted on the same
    images.

    Args:
        sentences: ``[N, E]``, one of each pair; sentences and images may repeat.
        features: ``[N, D]``, the features of the images.

    Raises:
        UsageError: There are fewer than 2 pairs.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> texts = torch.randn(300, 8, generator=generator)
        >>> images = texts @ torch.randn(8, 20, generator=generator)
        >>> TextScorer(texts[:200], images[:200]).score(images[200:], texts[200:]).rank
        1.0
    """

    def __init__(self, sentences: Tensor, features: Tensor) -> None:
        if len(sentences) < 2:
            raise UsageError(f"the text score is fitted on {len(sentences)} pairs; it needs at least 2.")
        x, y = sentences.double(), features.double()
        self.text_mean, self.mean = x.mean(0), y.mean(0)
        self.deviation = y.std(0).clamp(min=1e-6)
        x, y = x - self.text_mean, (y - self.mean) / self.deviation
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        uy = u.T @ y  # [E, D]
        left = (y.square().sum() - uy.square().sum()).clamp(min=0)  # the error that no linear map can remove
        errors = []
        # Smaller values only fit noise; larger ones predict the mean.
        self.alphas = (s[0].square() * torch.logspace(-6, 1, 36, dtype=torch.float64)).tolist()
        for alpha in self.alphas:
            kept = s.square() / (s.square() + alpha)
            residual = left + ((1 - kept)[:, None] * uy).square().sum()
            errors.append((residual / (1 - kept.sum() / len(x)).clamp(min=1e-9).square()).item())
        self.alpha = self.alphas[errors.index(min(errors))]
        self.weights = vh.T @ ((s / (s.square() + self.alpha))[:, None] * uy)  # [E, D]

    def predicted(self, sentences: Tensor) -> Tensor:
        """The features predicted from sentences, centred and scaled, ``[N, D]`` float64."""
        return (sentences.double() - self.text_mean) @ self.weights

    def score(self, features: Tensor, sentences: Tensor, candidates: Tensor | None = None) -> TextScores:
        """Score images with their sentences.

        Args:
            features: ``[N, D]``, the features of the images.
            sentences: ``[N, E]``, each image's own sentence.
            candidates: ``[M, E]``, further texts to rank each image's own among.
        """
        images = F.normalize((features.double() - self.mean) / self.deviation, dim=1)
        own = (images * F.normalize(self.predicted(sentences), dim=1)).sum(1)  # [N]
        texts = torch.unique(sentences if candidates is None else torch.cat([sentences, candidates]), dim=0)
        others = images @ F.normalize(self.predicted(texts), dim=1).T  # [N, M]
        # An image's own text is among the candidates; rounding must not rank it before itself.
        ranks = 1 + (others > own[:, None] + 1e-9).sum(1)
        return TextScores(
            similarity=own.mean().item(), rank=ranks.double().quantile(0.5).item(),
            top1=(ranks == 1).double().mean().item(), top10=(ranks <= 10).double().mean().item(), candidates=len(texts),
        )  # fmt: skip
