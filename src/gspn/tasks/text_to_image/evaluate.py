"""Evaluation of images sampled from text, against a reference and against their captions: :func:`evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ..._console import default_console
from ..._errors import UsageError
from ..core.loaders import open_data
from ..diffusion.evaluation import ImageMetrics, compare_images
from ..diffusion.images import open_images, read_images, read_record
from .pipelines import minilm


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
    """The result of :meth:`TextScorer.score`."""

    similarity: float
    """Cosine between an image's features and those that its text predicts, mean over the images."""
    rank: float
    """Median rank of an image's own text among all candidates; 1 is the best."""
    top1: float
    """Share of the images whose own text ranks first."""
    top10: float
    """Share of the images whose own text is among the first ten."""
    candidates: int
    """The number of candidate texts."""


class TextScorer:
    """A ridge regression from sentences to image features, and the scores of images and texts by it.

    With sentences s (:func:`embed_sentences`) and features f of real images, both centred and the features divided by
    their deviations::

        min over W of  Σ ‖W s - f‖² + α ‖W‖²

    with the α that minimises the error of generalised cross-validation. It is a small stand-in for CLIP
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
        """Score images with features ``[N, D]`` and their own sentences ``[N, E]``.

        ``candidates`` ``[M, E]`` are further texts to rank each image's own among.
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


@dataclass(frozen=True, kw_only=True)
class TextEvaluation(ImageMetrics):
    """The result of :func:`evaluate`."""

    text: TextScores
    """The scores of the samples with their prompts."""
    real: TextScores | None
    """The scores of the reference's own images of the same prompts; None if it has fewer than two."""


class Reference:
    """The real images of a split at one size, with their captions, to compare several directories of samples with.

    Args:
        name: A data set with captions and its split, such as ``emoji:train``.
        height: In pixels.
        width: In pixels.
        root: The directory of the data set, if it is not part of the package.

    Raises:
        UsageError: It cannot be opened.
    """

    def __init__(self, name: str, height: int, width: int, root: str | Path | None = None) -> None:
        self.name, self.root = name, root
        self.data, _, split = name.rpartition(":")
        if not self.data:
            raise UsageError(f"{name!r} is not a data set with its split; give one such as emoji:train.")
        captioned = open_data(self.data, split, root, kind="captioned")
        items = [(captioned.filename(i), i) for i in range(len(captioned))]
        self.images, kept = read_images(name, items, lambda i: (captioned.image(i), -1), (height, width))
        self.captions = [captioned.captions(i) for i in kept]
        self._scorer: TextScorer | None = None

    def scorer(self, features: Tensor) -> TextScorer:
        """The map from captions to the features of the images, ``[N, D]``; that of the first call is kept."""
        if self._scorer is None:
            pairs = [(i, caption) for i, some in enumerate(self.captions) for caption in some]
            self._scorer = TextScorer(embed_sentences([text for _, text in pairs]), features[[i for i, _ in pairs]])
        return self._scorer


def evaluate(
    samples: str | Path, reference: str | Reference = "emoji:train", *, root: str | Path | None = None,
    size: int | None = None, distractors: str | None = None, features: str = "auto", batch_size: int = 64,
    device: str = "auto", cache: Path | None = Path("runs/features"), console: Console | None = None,
) -> TextEvaluation:  # fmt: skip
    """Compare sampled images with a reference, and score how well they match their prompts.

    Args:
        samples: A directory that `gspn t2i sample` wrote; each image records its prompt.
        reference: A data set with captions and its split, such as ``emoji:train``: the real images, on which the map
            from text to features is fitted too. For several directories, one :class:`Reference` at their size.
        root: The directory of the reference, if it is not part of the package.
        size: Height and width to compare at, for all sets; by default those of the samples.
        distractors: Another split of the reference's data set, whose captions are further candidates.
        features: ``"lite0"``, ``"inception"`` or ``"auto"``, as in `gspn class-conditional evaluate`.
        batch_size: Images in a batch.
        device: ``"auto"``, a GPU if there is one, or ``"cpu"``.
        cache: A directory that keeps the reference's features for later calls; None to keep nothing.
        console: Where to print; standard output by default.

    Returns:
        The metrics, which can be compared only with those of the same features and reference.

    Raises:
        UsageError: A set cannot be opened, is too small, or does not record its prompts.
        MissingExtraError: A package is not installed.

    Example:
        >>> from gspn.tasks.text_to_image.evaluate import evaluate
        >>> evaluate("samples", "emoji:train").text.rank  # doctest: +SKIP
    """
    sampled = open_images(samples, size=None if size is None else (size, size))
    prompts = [prompt_of(Path(samples) / name) for name in sampled.names]
    if isinstance(reference, str):
        reference = Reference(reference, *sampled.pixels.shape[2:], root=root)
    metrics, fake, real = compare_images(
        sampled, reference.images, features=features, batch_size=batch_size, device=device, cache=cache,
        console=console or default_console(),
    )  # fmt: skip
    scorer = reference.scorer(real.pooled)
    candidates = None
    if distractors is not None:
        other = open_data(reference.data, distractors, reference.root, kind="captioned")
        candidates = embed_sentences([other.captions(i)[0] for i in range(len(other))])
    text = scorer.score(fake.pooled, embed_sentences(prompts), candidates)
    index = {some[0]: i for i, some in enumerate(reference.captions)}
    known = [prompt for prompt in dict.fromkeys(prompts) if prompt in index]
    own = None
    if len(known) > 1:
        own = scorer.score(real.pooled[[index[prompt] for prompt in known]], embed_sentences(known), candidates)
    return TextEvaluation(samples=str(samples), reference=reference.name, **metrics, text=text, real=own)


def prompt_of(path: Path) -> str:
    """The prompt that a sampled image records.

    Raises:
        UsageError: It records none.
    """
    prompt = read_record(path).get("prompt")
    if not isinstance(prompt, str):
        raise UsageError(f"{str(path)!r} does not record its prompt; evaluate images that `gspn t2i sample` wrote.")
    return prompt
