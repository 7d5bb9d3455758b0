"""Measuring generated images: :func:`evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor

from ..._files import replaced, write_text
from ..core.devices import make_accelerator
from ..core.errors import UsageError, require
from ..core.progress import progress_bar
from ..diffusion.features import FeatureNetwork, Features, feature_network
from ..diffusion.image_sets import ImageSet, open_images
from ..diffusion.metrics import frechet_distance, inception_score, kernel_distance, nearest, precision_recall


@dataclass(frozen=True)
class Evaluation:
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
        sfid: Of spatial features.
        kid: Kernel distance, mean over subsets.
        kid_std: Its deviation.
        inception_score: Mean over parts.
        inception_score_std: Its deviation.
        precision: Share of samples like the reference.
        recall: Share of the reference like some sample.
        consistency: Share of samples that the classifier takes for the class that was asked for; None without one.
        classifier: As it was named.
        per_class: The same for each class that samples were asked for.
        broken: Images that could not be read.
    """

    samples: str
    reference: str
    features: str
    sample_count: int
    reference_count: int
    height: int
    width: int
    fid: float
    sfid: float
    kid: float
    kid_std: float
    inception_score: float
    inception_score_std: float
    precision: float
    recall: float
    consistency: float | None = None
    classifier: str | None = None
    per_class: dict[str, float] | None = None
    broken: tuple[str, ...] = ()

    def write_json(self, path: Path) -> None:
        """Write everything as JSON, replacing the file as a whole."""
        write_text(path, json.dumps(asdict(self), indent=1))


def evaluate(
    samples: str | Path,
    reference: str | Path,
    *,
    features: str = "auto",
    classifier: str | Path | None = None,
    neighbours: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    cache: Path | None = Path("runs/features"),
    console: Console | None = None,
) -> Evaluation:
    """Measure how alike generated images and a reference are.

    Args:
        samples: What :func:`~gspn.tasks.diffusion.image_sets.open_images` opens.
        reference: Likewise; brought to the size of the samples.
        features: ``"lite0"``, ``"inception"`` or ``"auto"``: see
            :func:`~gspn.tasks.diffusion.features.feature_network`.
        classifier: A model of ``gspn classify`` that says of each sample what it is.
        neighbours: Where to draw some samples with their nearest images of the reference, so that memorising shows.
        limit: At most so many images of each set.
        batch_size: Images at a time.
        device: ``"auto"`` takes a GPU if there is one, ``"cpu"`` none.
        cache: Where the reference's features are kept for the next time; None for nowhere.
        console: Where to print; standard output by default.

    Returns:
        The figures.

    Raises:
        UsageError: a set cannot be opened or is too small, or there is no such feature network or classifier.
        MissingExtraError: a package is not installed.

    Example:
        >>> from gspn.tasks.class_conditional import evaluate
        >>> evaluate("samples", "mnist5k:train").fid  # doctest: +SKIP
    """
    console = console or Console()
    ours = open_images(samples, limit=limit)
    size = (ours.pixels.shape[2], ours.pixels.shape[3])
    theirs = open_images(reference, size=size, limit=limit)
    network = feature_network(features)
    where = make_accelerator(device=device).device
    fake = features_of(network, ours, batch_size, where, console)
    real = cached_features(network, theirs, batch_size, where, console, cache)
    kid, kid_std = kernel_distance(real.pooled, fake.pooled)
    score, score_std = inception_score(fake.logits)
    precision, recall = precision_recall(real.pooled, fake.pooled)
    agreed = None if classifier is None else _agreement(ours, classifier, batch_size, device)
    if neighbours is not None:
        with replaced(neighbours) as part:
            draw_neighbours(ours, theirs, fake.pooled, real.pooled).save(part, format="PNG")
    return Evaluation(
        samples=str(samples),
        reference=str(reference),
        features=network.label,
        sample_count=len(ours),
        reference_count=len(theirs),
        height=size[0],
        width=size[1],
        fid=frechet_distance(real.pooled, fake.pooled),
        sfid=frechet_distance(real.spatial, fake.spatial),
        kid=kid,
        kid_std=kid_std,
        inception_score=score,
        inception_score_std=score_std,
        precision=precision,
        recall=recall,
        consistency=None if agreed is None else sum(hit for _, hit in agreed) / len(agreed),
        classifier=None if classifier is None else str(classifier),
        per_class=None if agreed is None else _by_class(agreed),
        broken=tuple(ours.broken + theirs.broken),
    )


def draw_neighbours(
    samples: ImageSet, reference: ImageSet, fake: Tensor, real: Tensor, *, rows: int = 10, columns: int = 6
) -> Image.Image:
    """Some samples, each beside its nearest images of the reference: by features, and by pixels.

    Args:
        samples: Of which ``rows`` are taken, those nearest to the reference first: where memorising would show.
        reference: Of the same size.
        fake: Features of the samples ``[M, D]``.
        real: Of the reference ``[N, D]``.
        rows: Samples.
        columns: Neighbours of each kind.
    """
    columns, rows = min(columns, len(reference)), min(rows, len(samples))
    distances, by_features = nearest(fake, real, k=columns)
    order = distances[:, 0].argsort()
    # Half of them the nearest of all, half spread over the rest.
    half = (rows + 1) // 2
    rest = order[half:]
    spread = [int(rest[i * len(rest) // (rows - half)]) for i in range(rows - half)] if rows > half else []
    chosen = [*order[:half].tolist(), *spread]
    flat = reference.pixels.flatten(1).double() / 255
    apart, by_pixels = nearest(samples.pixels[chosen].flatten(1).double() / 255, flat, k=columns)

    height, width = samples.pixels.shape[2:]
    scale = max(1, -(-64 // max(height, width)))
    tall, wide = height * scale, width * scale
    gap, line, top = 6, 14, 26
    gutter = 5 * gap
    total = 3 * gap + wide * (1 + 2 * columns) + gap * 2 * columns + 2 * gutter
    sheet = Image.new("RGB", (total, top + rows * (tall + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    ink, muted = (31, 31, 51), (110, 112, 130)
    starts = [gap, gap + wide + gutter, gap + wide + 2 * gutter + columns * (wide + gap)]
    for x, title in zip(starts, ("sample", "nearest by features", "nearest by pixels"), strict=True):
        pen.text((x, gap), title, fill=ink)

    def put(pixels: Tensor, x: int, y: int, text: str) -> None:
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(image.resize((wide, tall), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + wide, y + tall), outline=(220, 222, 230))
        pen.text((x, y + tall + 1), text, fill=muted)

    for row, index in enumerate(chosen):
        y = top + row * (tall + line + gap)
        put(samples.pixels[index], starts[0], y, f"#{index}")
        for column in range(columns):
            step = column * (wide + gap)
            put(reference.pixels[by_features[index, column]], starts[1] + step, y, f"{distances[index, column]:.3g}")
            put(reference.pixels[by_pixels[row, column]], starts[2] + step, y, f"{apart[row, column]:.3g}")
    return sheet


def _by_class(agreed: list[tuple[str, bool]]) -> dict[str, float]:
    hits: dict[str, list[bool]] = {}
    for name, hit in agreed:
        hits.setdefault(name, []).append(hit)
    return {name: sum(found) / len(found) for name, found in hits.items()}


def _agreement(samples: ImageSet, classifier: str | Path, batch_size: int, device: str) -> list[tuple[str, bool]]:
    """For each sample the class it was asked for, and whether the classifier says so too."""
    if any(label < 0 for label in samples.labels):
        raise UsageError(
            f"{samples.name} does not say which class each image was asked for; leave --classifier out, or evaluate "
            "what `gspn class-conditional sample` wrote."
        )
    from ..classify import predict
    from ..classify.model import label_names, load_model

    network = load_model(classifier)
    names = label_names(network)
    images = [Image.fromarray(one.permute(1, 2, 0).contiguous().numpy()) for one in samples.pixels]
    guesses = predict(images, network, top=1, batch_size=batch_size, device="cpu" if device == "cpu" else "auto")
    return [
        (names[label] if names is not None and label < len(names) else str(label), guess.indices[0] == label)
        for label, guess in zip(samples.labels, guesses, strict=True)
    ]


@torch.inference_mode()
def features_of(
    network: FeatureNetwork, images: ImageSet, batch_size: int, device: torch.device, console: Console
) -> Features:
    """The features of a set of images, on the CPU."""
    network = network.to(device)
    found: list[Features] = []
    with progress_bar(console, f"features of {images.name}", len(images)) as advance:
        for batch in images.pixels.split(batch_size):
            out = network(batch.to(device).float() / 255)
            found.append(Features(*(part.float().cpu() for part in out)))
            advance(len(batch))
    return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def cached_features(
    network: FeatureNetwork,
    images: ImageSet,
    batch_size: int,
    device: torch.device,
    console: Console,
    cache: Path | None,
) -> Features:
    """Likewise, kept in a directory for the next time; None for nowhere."""
    if cache is None:
        return features_of(network, images, batch_size, device, console)
    safetensors = require("safetensors.torch")
    kind = type(network).__name__.lower()
    path = cache / f"{kind}-{images.digest()}.safetensors"
    if path.is_file():
        try:
            stored = safetensors.load_file(path)
            return Features(stored["pooled"], stored["spatial"], stored["logits"])
        except Exception as error:  # damaged: computed again, and replaced
            console.print(f"[yellow]warning:[/] {path} cannot be read ({error}) and is made again", highlight=False)
    found = features_of(network, images, batch_size, device, console)
    with replaced(path) as part:
        safetensors.save_file({name: value.contiguous() for name, value in found._asdict().items()}, part)
    return found
