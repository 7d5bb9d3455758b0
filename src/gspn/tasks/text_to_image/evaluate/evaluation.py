"""Evaluation of images sampled from text: :func:`evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...core.errors import UsageError
from ...core.loaders import open_data
from ...diffusion.evaluation import ImageMetrics, compare_images
from ...diffusion.images import ImageSet, open_images, read_images, read_record
from .text_scores import TextScorer, TextScores, embed_sentences


@dataclass(frozen=True, kw_only=True)
class TextEvaluation(ImageMetrics):
    """The result of :func:`evaluate`.

    Attributes:
        text: The scores of the samples with their prompts.
        real: The scores of the reference's own images of the same prompts; None if it has fewer than two.
    """

    text: TextScores
    real: TextScores | None


def evaluate(
    samples: str | Path, reference: str = "emoji:train", *, root: str | Path | None = None, size: int | None = None,
    distractors: str | None = None, features: str = "auto", batch_size: int = 64, device: str = "auto",
    cache: Path | None = Path("runs/features"), console: Console | None = None,
) -> TextEvaluation:  # fmt: skip
    """Compare sampled images with a reference, and score how well they match their prompts.

    Args:
        samples: A directory that `gspn t2i sample` wrote; each image records its prompt.
        reference: A data set with captions and its split, such as ``emoji:train``: the real images, on which the map
            from text to features is fitted too.
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
    name, _, split = reference.rpartition(":")
    if not name:
        raise UsageError(f"{reference!r} is not a data set with its split; give one such as emoji:train.")
    real_images, captions = _open_reference(name, split, root, (sampled.pixels.shape[2], sampled.pixels.shape[3]))
    metrics, fake, real = compare_images(
        sampled, real_images, features=features, batch_size=batch_size, device=device, cache=cache,
        console=console or Console(),
    )  # fmt: skip
    pairs = [(i, caption) for i, some in enumerate(captions) for caption in some]
    scorer = TextScorer(embed_sentences([text for _, text in pairs]), real.pooled[[i for i, _ in pairs]])
    candidates = None
    if distractors is not None:
        other = open_data(name, distractors, root, captions=True)
        candidates = embed_sentences([other.captions(i)[0] for i in range(len(other))])
    text = scorer.score(fake.pooled, embed_sentences(prompts), candidates)
    index = {some[0]: i for i, some in enumerate(captions)}
    known = [prompt for prompt in dict.fromkeys(prompts) if prompt in index]
    own = None
    if len(known) > 1:
        own = scorer.score(real.pooled[[index[prompt] for prompt in known]], embed_sentences(known), candidates)
    return TextEvaluation(samples=str(samples), reference=reference, **metrics, text=text, real=own)


def prompt_of(path: Path) -> str:
    """The prompt that a sampled image records.

    Raises:
        UsageError: It records none.
    """
    prompt = read_record(path).get("prompt")
    if not isinstance(prompt, str):
        raise UsageError(f"{str(path)!r} does not record its prompt; evaluate images that `gspn t2i sample` wrote.")
    return prompt


def _open_reference(
    name: str, split: str, root: str | Path | None, size: tuple[int, int]
) -> tuple[ImageSet, list[tuple[str, ...]]]:
    """The images of a reference and their captions, without broken images."""
    images = open_data(name, split, root, captions=True)
    items = [(images.filename(i), i) for i in range(len(images))]
    real, kept = read_images(f"{name}:{split}", items, lambda i: (images.image(i), -1), size)
    return real, [images.captions(i) for i in kept]
