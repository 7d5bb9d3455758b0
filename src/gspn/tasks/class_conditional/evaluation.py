"""Measure sampled images: :func:`evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from torch import Tensor

from ..._console import default_console
from ..._errors import UsageError
from ..._files import printable
from ..core.devices import is_main_process
from ..diffusion.evaluation import ImageMetrics, compare_images
from ..diffusion.image_grid import draw_grid
from ..diffusion.images import ImageSet, open_images, save_png
from ..diffusion.metrics import nearest

_SHOWN = 5


@dataclass(frozen=True)
class Classifier:
    """A classifier that tells whether samples show their class."""

    name: str
    classify: Callable[[Sequence[Image.Image]], Sequence[int]]
    """From images to the index of each one's class."""
    class_names: Sequence[str] | None = None
    """By index; None where they are unknown."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(ImageMetrics):
    """The result of :func:`evaluate`."""

    consistency: float | None = None
    """Share of samples that the classifier assigns to the class they were sampled for; None without one."""
    classifier: str | None = None
    per_class: dict[str, float] | None = None
    """The consistency of each class."""
    broken: tuple[str, ...] = ()
    """Images that could not be read."""


def evaluate(
    samples: str | Path,
    reference: str | Path,
    *,
    features: str = "auto",
    classifier: Classifier | None = None,
    neighbours: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    cache: Path | None = Path("runs/features"),
    console: Console | None = None,
) -> Evaluation:
    """Measure how alike sampled images and a reference are.

    Args:
        samples: A set of images for :func:`~gspn.tasks.diffusion.images.open_images`.
        reference: Another one, resized to the samples.
        features: ``"lite0"``, ``"inception"`` or ``"auto"``: see
            :func:`~gspn.tasks.diffusion.features.feature_model`.
        classifier: Tells whether samples show the class that they were sampled for.
        neighbours: A PNG to draw: samples beside their nearest images of the reference, where memorising would show.
        limit: At most so many images of each set.
        batch_size: Images at a time.
        device: ``"auto"`` uses a GPU if there is one, ``"cpu"`` does not.
        cache: Directory that keeps the reference's features for the next time; None for none.
        console: Where to print; standard output by default.

    Raises:
        UsageError: A set cannot be opened or is too small, or the feature model is unknown.
        MissingExtraError: A package is not installed.

    Example:
        >>> from gspn.tasks.class_conditional import evaluate
        >>> evaluate("samples", "mnist5k:train").fid  # doctest: +SKIP
    """
    ours = open_images(samples, limit=limit)
    theirs = open_images(reference, size=(ours.pixels.shape[2], ours.pixels.shape[3]), limit=limit)
    per_class = None if classifier is None else _hits(ours, classifier)  # refuses other classes before the long work
    metrics, fake, real = compare_images(
        ours, theirs, features=features, batch_size=batch_size, device=device, cache=cache,
        console=console or default_console(),
    )  # fmt: skip
    if neighbours is not None and is_main_process():
        save_png(neighbours, draw_neighbours(ours, theirs, fake.pooled, real.pooled))
    return Evaluation(
        samples=str(samples),
        reference=str(reference),
        **metrics,
        consistency=None if per_class is None else sum(map(sum, per_class.values())) / len(ours),
        classifier=None if classifier is None else classifier.name,
        per_class=None if per_class is None else {name: sum(hits) / len(hits) for name, hits in per_class.items()},
        broken=tuple(ours.broken + theirs.broken),
    )


def draw_neighbours(
    samples: ImageSet, reference: ImageSet, fake: Tensor, real: Tensor, *, rows: int = 10, columns: int = 6
) -> Image.Image:
    """Draw samples, each beside its nearest images of the reference: by features, and by pixels.

    Half of the rows are the samples nearest to the reference, where memorising would show first; the others are spread
    over the rest. ``fake`` and ``real`` are the features of the samples ``[M, D]`` and of the reference ``[N, D]``.
    """
    columns, rows = min(columns, len(reference)), min(rows, len(samples))
    distances, by_features = nearest(fake, real, k=columns)
    order = distances[:, 0].argsort()
    half = (rows + 1) // 2
    rest = order[half:]
    chosen = [*order[:half].tolist(), *(int(rest[i * len(rest) // (rows - half)]) for i in range(rows - half))]
    pixels = [images.flatten(1).double() / 255 for images in (samples.pixels[chosen], reference.pixels)]
    pixel_distances, by_pixels = nearest(*pixels, k=columns)
    images = [
        [samples.to_pil(i)] + [reference.to_pil(int(j)) for j in (*by_features[i], *by_pixels[row])]
        for row, i in enumerate(chosen)
    ]
    captions = [
        [f"#{i}", *(f"{distance:.3g}" for distance in (*distances[i], *pixel_distances[row]))]
        for row, i in enumerate(chosen)
    ]
    titles = ["sample"]
    for kind in ("features", "pixels"):
        titles += [f"nearest by {kind}", *[""] * (columns - 1)]
    return draw_grid(images, titles=titles, captions=captions, smallest=64)


def _hits(samples: ImageSet, classifier: Classifier) -> dict[str, list[bool]]:
    """Whether the classifier finds the class of each sample, by the name of that class.

    Names of classes are looked up among the classifier's own. A number counts only where there is no name: for images
    of a model that does not name its classes, and for archives.
    """
    if any(label < 0 for label in samples.labels):
        raise UsageError(
            f"{samples.name} does not say which class each image was sampled for; leave --classifier out, or evaluate "
            "the output of `gspn class-conditional sample`."
        )
    names = list(classifier.class_names or ())
    known = {name: i for i, name in enumerate(names)}
    own = samples.classes or [None] * len(samples)
    unknown = sorted({name for name in own if name is not None and name not in known})
    if unknown:
        what = f"names {', '.join(map(printable, names[:_SHOWN]))}, ..." if names else "does not name its classes"
        raise UsageError(
            f"{samples.name} has images of {', '.join(map(repr, unknown[:_SHOWN]))}, and the classifier "
            f"{printable(classifier.name)} {what}; use the classifier of these classes, or leave it out."
        )
    labels = [label if name is None else known[name] for label, name in zip(samples.labels, own, strict=True)]
    if names and max(labels) >= len(names):
        raise UsageError(
            f"{samples.name} has images of class {max(labels)}, and the classifier {printable(classifier.name)} "
            f"has {len(names)} classes; use the classifier of these classes, or leave it out."
        )
    guesses = classifier.classify([samples.to_pil(i) for i in range(len(samples))])
    hits: dict[str, list[bool]] = {}
    for label, guess in zip(labels, guesses, strict=True):
        hits.setdefault(names[label] if label < len(names) else str(label), []).append(guess == label)
    return hits
