"""Applying a classifier to images: :func:`predict`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import require
from .model import label_names, load_model, resolve_preprocessing


@dataclass(frozen=True)
class Prediction:
    """What a classifier takes an image for.

    Attributes:
        image: The file, or the position of what was not a file.
        classes: The most probable classes, most probable first.
        probabilities: Of these, in [0, 1].
        indices: Of these, in the model's output.
        broken: Why the image could not be read; None for a sound one. The rest is empty then.
    """

    image: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    indices: tuple[int, ...] = ()
    broken: str | None = None


@torch.inference_mode()
def predict(
    images: Iterable[Any],
    model: str | Path | nn.Module,
    *,
    top: int = 5,
    batch_size: int = 16,
    device: Literal["auto", "cpu"] = "auto",
) -> list[Prediction]:
    """Classify images.

    Args:
        images: Paths, or PIL images.
        model: What :func:`~gspn.tasks.classify.model.load_model` finds, or a timm model.
        top: How many classes of each image to return.
        batch_size: Images in a forward pass.
        device: `auto` takes a GPU if there is one.

    Returns:
        One for each image, in order. An image that cannot be read has ``broken`` set, and the others go on.

    Raises:
        UsageError: the model cannot be found.
        MissingExtraError: a package of ``gspn[train]`` is not installed.

    Example:
        >>> import timm
        >>> from PIL import Image
        >>> from gspn.tasks.classify import predict
        >>> network = timm.create_model("test_vit", num_classes=3)
        >>> [found] = predict([Image.new("RGB", (20, 20))], network, top=2)
        >>> len(found.probabilities), found.broken
        (2, None)
    """
    require("timm", "torchvision", "safetensors")
    network = model.eval() if isinstance(model, nn.Module) else load_model(model)
    where = torch.device("cpu")
    if device == "auto" and torch.accelerator.is_available():
        where = torch.accelerator.current_accelerator() or where
    network = network.to(where)
    names = label_names(network)
    transform = resolve_preprocessing(network).transform()
    found: list[Prediction] = []
    batch: list[tuple[str, torch.Tensor]] = []

    def flush() -> None:
        if batch:
            logits = network(torch.stack([image for _, image in batch]).to(where))  # [B, K]
            for (name, _), scores in zip(batch, logits.float().softmax(-1).cpu(), strict=True):
                found.append(_prediction(name, scores, names, top))
            batch.clear()

    for position, image in enumerate(images):
        name, opened = _open(image, position)
        if isinstance(opened, str):
            flush()
            found.append(Prediction(name, broken=opened))
            continue
        batch.append((name, transform(opened)))
        if len(batch) == batch_size:
            flush()
    flush()
    return found


def _prediction(name: str, scores: torch.Tensor, names: Sequence[str] | None, top: int) -> Prediction:
    best = scores.topk(min(top, len(scores)))
    indices = tuple(int(i) for i in best.indices)
    classes = tuple(names[i] if names is not None and i < len(names) else str(i) for i in indices)
    return Prediction(name, classes, tuple(float(p) for p in best.values), indices)


def _open(image: Any, position: int) -> tuple[str, Any]:
    """A name, and the image in RGB or why there is none."""
    data = require("gspn.data")
    if not isinstance(image, str | Path):
        return str(position), image.convert("RGB")
    try:
        return str(image), data.load_image(image)
    except data.BrokenImageError as error:
        return str(image), error.reason
    except OSError as error:
        return str(image), error.strerror or str(error)
