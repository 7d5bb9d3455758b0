"""Measuring images that were generated from text: :func:`evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...core.errors import UsageError
from ...diffusion.evaluation import ImageMetrics, compare_images
from ...diffusion.images import ImageSet, open_images, read_images, read_record
from ..data import open_captioned
from .text_scores import TextScorer, TextScores, embed_sentences


@dataclass(frozen=True, kw_only=True)
class TextEvaluation(ImageMetrics):
    """The result of :func:`evaluate`.

    Attributes:
        text: How the samples agree with their prompts.
        real: How the reference's own images of the same prompts do, where it has them.
    """

    text: TextScores
    real: TextScores | None


def evaluate(
    samples: str | Path,
    reference: str = "emoji:train",
    *,
    root: str | Path | None = None,
    size: int | None = None,
    distractors: str | None = None,
    features: str = "auto",
    batch_size: int = 64,
    device: str = "auto",
    cache: Path | None = Path("runs/features"),
    console: Console | None = None,
) -> TextEvaluation:
    """Measure how alike generated images and a reference are, and how well they fit their prompts.

    Args:
        samples: A directory that `gspn t2i sample` wrote: each image says what it was asked for.
        reference: A data set with captions and its split, as ``emoji:train``: what samples are to be like, and what the
            map from text to features is fitted on.
        root: Where the reference lies, if it does not come with the package.
        size: Height and width to compare at, for all sets; by default those of the samples.
        distractors: Another split of the reference's data set, whose captions an image may be taken for as well.
        features: ``"lite0"``, ``"inception"`` or ``"auto"``, as in `gspn class-conditional evaluate`.
        batch_size: Images at a time.
        device: ``"auto"`` takes a GPU if there is one, ``"cpu"`` none.
        cache: Where the reference's features are kept for the next time; None for nowhere.
        console: Where to print; standard output by default.

    Returns:
        The figures. They compare only with others of the same features and the same reference.

    Raises:
        UsageError: a set cannot be opened, is too small, or does not say its prompts.
        MissingExtraError: a package is not installed.

    Example:
        >>> from gspn.tasks.text_to_image.evaluate import evaluate
        >>> evaluate("samples", "emoji:train").text.rank  # doctest: +SKIP
    """
    ours = open_images(samples, size=None if size is None else (size, size))
    prompts = [prompt_of(Path(samples) / name) for name in ours.names]
    shape = (ours.pixels.shape[2], ours.pixels.shape[3])
    theirs, captions = _captioned(reference, root, shape)
    metrics, fake, real = compare_images(
        ours, theirs, features=features, batch_size=batch_size, device=device, cache=cache, console=console or Console()
    )
    pairs = [(i, caption) for i, some in enumerate(captions) for caption in some]
    scorer = TextScorer(embed_sentences([text for _, text in pairs]), real.pooled[[i for i, _ in pairs]])
    further = None
    if distractors is not None:
        other = open_captioned(reference.rpartition(":")[0], distractors, None if root is None else Path(root))
        further = embed_sentences([other.captions(i)[0] for i in range(len(other))])
    text = scorer.score(fake.pooled, embed_sentences(prompts), further)
    places = {some[0]: i for i, some in enumerate(captions)}
    known = [prompt for prompt in dict.fromkeys(prompts) if prompt in places]
    own = None
    if len(known) > 1:
        own = scorer.score(real.pooled[[places[prompt] for prompt in known]], embed_sentences(known), further)
    return TextEvaluation(samples=str(samples), reference=reference, **metrics, text=text, real=own)


def prompt_of(path: Path) -> str:
    """What a generated image says it was asked for.

    Raises:
        UsageError: it does not say.
    """
    prompt = read_record(path).get("prompt")
    if not isinstance(prompt, str):
        raise UsageError(f"{str(path)!r} does not say its prompt; evaluate what `gspn t2i sample` wrote.")
    return prompt


def _captioned(source: str, root: str | Path | None, size: tuple[int, int]) -> tuple[ImageSet, list[tuple[str, ...]]]:
    """Images with their captions, broken ones left out."""
    name, _, split = source.rpartition(":")
    if not name:
        raise UsageError(f"{source!r} is not a data set with its split; name one as emoji:train.")
    images = open_captioned(name, split, None if root is None else Path(root))
    items = [(images.filename(i), i) for i in range(len(images))]
    found, kept = read_images(source, items, lambda i: (images.image(i), -1), size)
    return found, [images.captions(i) for i in kept]
