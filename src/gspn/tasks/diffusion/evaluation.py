"""The comparison of two sets of images by their features, which all tasks that sample images share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..._errors import UsageError
from ..._files import printable, read_tensors, write_text
from ..core.devices import Processes
from ..core.progress import progress_bar
from .features import FeatureModel, Features, feature_model
from .images import ImageSet
from .metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from .shard_cache import save_tensors


@dataclass(frozen=True, kw_only=True)
class ImageMetrics:
    """How alike samples and a reference are, both as the caller named them."""

    samples: str
    reference: str
    features: str
    """The feature model; figures compare only with those of the same one."""
    sample_count: int
    reference_count: int
    height: int
    width: int
    fid: float
    """Fréchet distance of pooled features."""
    sfid: float
    """Fréchet distance of spatial features."""
    kid: float
    """Kernel distance, mean over subsets."""
    kid_std: float
    inception_score: float
    """Mean over parts."""
    inception_score_std: float
    precision: float
    """Share of samples like the reference."""
    recall: float
    """Share of the reference like some sample."""

    def write_json(self, path: Path) -> None:
        """Write everything as JSON, in place of the file as a whole."""
        write_text(path, json.dumps(asdict(self), indent=1))


def compare_images(
    samples: ImageSet,
    reference: ImageSet,
    *,
    features: str = "auto",
    batch_size: int = 64,
    device: str = "auto",
    cache: Path | None = None,
    console: Console,
) -> tuple[dict[str, Any], Features, Features]:
    """Compare two sets of images of one size by the features of :func:`~.features.feature_model`.

    Under ``torchrun`` each process computes the features of a share of the batches, and returns the result of all.
    ``cache`` is a directory that keeps the reference's features for the next time.

    Returns:
        The fields of :class:`ImageMetrics` but the two names, and the features of both sets.

    Raises:
        UsageError: A set is too small, or the feature model is unknown.
        MissingExtraError: A package is not installed.
    """
    processes = Processes.join(device)
    model = feature_model(features).to(processes.device)
    fake = _features(model, samples, batch_size, processes, console)
    real = None
    path = cache and cache / f"{type(model).__name__.lower()}-{reference.digest()}.safetensors"
    if path is not None and path.is_file():
        try:
            real = _stored(path, len(reference))
        except (UsageError, OSError) as error:
            line = escape(f"{error} It is computed again, and replaced.")
            if processes.is_main:
                console.print(f"[yellow]warning:[/] {line}", highlight=False, soft_wrap=True)
    known = all(processes.gather(real is not None))
    if real is None or not known:
        real = _features(model, reference, batch_size, processes, console)
        if path is not None and processes.is_main:
            save_tensors(path, real._asdict())
    kid, kid_std = kernel_distance(real.pooled, fake.pooled)
    score, score_std = inception_score(fake.logits)
    precision, recall = precision_recall(real.pooled, fake.pooled)
    metrics = {
        "features": model.label,
        "sample_count": len(samples),
        "reference_count": len(reference),
        "height": samples.pixels.shape[2],
        "width": samples.pixels.shape[3],
        "fid": frechet_distance(real.pooled, fake.pooled),
        "sfid": frechet_distance(real.spatial, fake.spatial),
        "kid": kid,
        "kid_std": kid_std,
        "inception_score": score,
        "inception_score_std": score_std,
        "precision": precision,
        "recall": recall,
    }
    return metrics, fake, real


def _stored(path: Path, count: int) -> Features:
    """The features that an evaluation kept."""
    tensors = read_tensors(path)
    if tensors.keys() != set(Features._fields) or any(
        one.ndim != 2 or len(one) != count or not one.is_floating_point() or not bool(one.isfinite().all())
        for one in tensors.values()
    ):
        raise UsageError(f"{printable(path)} does not hold finite features of {count:,} images.")
    return Features(**tensors)


@torch.inference_mode()
def _features(
    model: FeatureModel, images: ImageSet, batch_size: int, processes: Processes, console: Console
) -> Features:
    """The features of a set of images, on the CPU."""
    batches = images.pixels.split(batch_size)
    own: dict[int, Features] = {}
    shown = console if processes.is_main else None
    count = sum(map(len, processes.share(batches)))
    with progress_bar(shown, f"features of {images.name}", count) as advance:
        for number in processes.share(range(len(batches))):
            outputs = model(batches[number].to(processes.device).float() / 255)
            own[number] = Features(*(one.float().cpu() for one in outputs))
            advance(len(batches[number]))
    everyone = {number: part for some in processes.gather(own) for number, part in some.items()}
    parts = [everyone[number] for number in range(len(batches))]
    return Features(*(torch.cat(one) for one in zip(*parts, strict=True)))
