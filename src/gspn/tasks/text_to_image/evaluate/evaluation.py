"""Measuring images that were generated from text: :func:`evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console

from ...._files import write_text
from ...class_conditional.evaluation import cached_features, features_of
from ...core.devices import make_accelerator
from ...core.errors import UsageError
from ...diffusion.features import feature_network
from ...diffusion.image_records import METADATA
from ...diffusion.image_sets import ImageSet, gathered, open_images
from ...diffusion.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from ..data import open_captioned
from .text_scores import TextScorer, TextScores, embed_sentences


@dataclass(frozen=True)
class TextEvaluation:
    """What :func:`evaluate` found.

    Attributes:
        samples: As they were named.
        reference: Likewise.
        features: The network; figures compare only with those of the same one.
        sample_count: Images that counted.
        reference_count: Likewise.
        height: Of the images compared.
        width: Likewise.
        fid: Fréchet distance of pooled features.
        kid: Kernel distance, mean over subsets.
        inception_score: Mean over parts.
        precision: Share of samples like the reference.
        recall: Share of the reference like some sample.
        text: How the samples agree with their prompts.
        real: How the reference's own images of the same prompts do, where it has them.
    """

    samples: str
    reference: str
    features: str
    sample_count: int
    reference_count: int
    height: int
    width: int
    fid: float
    kid: float
    inception_score: float
    precision: float
    recall: float
    text: TextScores
    real: TextScores | None

    def write_json(self, path: Path) -> None:
        """Write everything as JSON, replacing the file as a whole."""
        write_text(path, json.dumps(asdict(self), indent=1))


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
    console = console or Console()
    ours = open_images(samples, size=None if size is None else (size, size))
    prompts = [prompt_of(Path(samples) / name) for name in ours.names]
    shape = (ours.pixels.shape[2], ours.pixels.shape[3])
    theirs, captions = _captioned(reference, root, shape)
    network = feature_network(features)
    where = make_accelerator(device=device).device
    fake = features_of(network, ours, batch_size, where, console)
    real = cached_features(network, theirs, batch_size, where, console, cache)

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
    precision, recall = precision_recall(real.pooled, fake.pooled)
    return TextEvaluation(
        samples=str(samples),
        reference=reference,
        features=network.label,
        sample_count=len(ours),
        reference_count=len(theirs),
        height=shape[0],
        width=shape[1],
        fid=frechet_distance(real.pooled, fake.pooled),
        kid=kernel_distance(real.pooled, fake.pooled)[0],
        inception_score=inception_score(fake.logits)[0],
        precision=precision,
        recall=recall,
        text=text,
        real=own,
    )


def prompt_of(path: Path) -> str:
    """What a generated image says it was asked for.

    Raises:
        UsageError: it does not say.
    """
    try:
        with Image.open(path) as image:
            record = json.loads(getattr(image, "text", {}).get(METADATA, "null"))
        prompt = record["prompt"]
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        prompt = None
    if not isinstance(prompt, str):
        raise UsageError(f"{str(path)!r} does not say its prompt; evaluate what `gspn t2i sample` wrote.")
    return prompt


def _captioned(source: str, root: str | Path | None, size: tuple[int, int]) -> tuple[ImageSet, list[tuple[str, ...]]]:
    """Images with their captions, broken ones left out."""
    from gspn.data import BrokenImageError

    name, _, split = source.rpartition(":")
    if not name:
        raise UsageError(f"{source!r} is no data set with its split; name one as emoji:train.")
    dataset = open_captioned(name, split, None if root is None else Path(root))
    images, names, captions, broken = [], [], [], []
    for i in range(len(dataset)):
        try:
            images.append(dataset.image(i))
        except (BrokenImageError, OSError) as error:
            broken.append(str(error))
            continue
        names.append(dataset.filename(i))
        captions.append(dataset.captions(i))
    return gathered(source, images, [-1] * len(images), names, size, broken), captions
