"""Applying a classifier to images: :func:`predict`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..._errors import UsageError, require
from ..._files import printable
from ..core.devices import inference_device
from .model import label_names, load_model, resolve_preprocessing


@dataclass(frozen=True)
class Prediction:
    """The classification of an image.

    Attributes:
        image: The file, or the position in the input of an image that is not a file.
        classes: The most probable classes, most probable first.
        probabilities: Their probabilities, in [0, 1].
        indices: Their indices in the model's output.
        broken: Why the image could not be read, in which case the other attributes are empty; else None.
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
        images: Paths, or PIL images. A folder stands for the images in it.
        model: A name or path that :func:`~gspn.tasks.classify.model.load_model` accepts, or a timm model.
        top: Number of classes to return for each image.
        batch_size: Images per forward pass.
        device: `auto` uses a GPU if there is one.

    Returns:
        One prediction for each image, in order. For an image that cannot be read, ``broken`` is set.

    Raises:
        UsageError: the model cannot be found, or a folder has no images.
        TypeError: an image is neither a path nor a PIL image.
        MissingExtraError: a package of ``gspn[train]`` is not installed.

    Example:
        >>> import timm
        >>> from PIL import Image
        >>> from gspn.tasks.classify import predict
        >>> model = timm.create_model("test_vit", num_classes=3)
        >>> [prediction] = predict([Image.new("RGB", (20, 20))], model, top=2)
        >>> len(prediction.probabilities), prediction.broken
        (2, None)
    """
    require("timm", "torchvision", "safetensors")
    classifier = model.eval() if isinstance(model, nn.Module) else load_model(model)
    where = inference_device(device)
    classifier = classifier.to(where)
    names = label_names(classifier)
    transform = resolve_preprocessing(classifier).transform()
    predictions: list[Prediction] = []
    batch: list[tuple[str, torch.Tensor]] = []

    def flush() -> None:
        if batch:
            logits = classifier(torch.stack([image for _, image in batch]).to(where))  # [B, K]
            for (name, _), scores in zip(batch, logits.float().softmax(-1).cpu(), strict=True):
                predictions.append(_prediction(name, scores, names, top))
            batch.clear()

    named = _named(images)
    if isinstance(images, Sequence):
        named = list(named)  # a folder without images is refused before the work begins
    for name, image in named:
        opened = _open(name, image)
        if isinstance(opened, str):
            flush()
            predictions.append(Prediction(name, broken=opened))
            continue
        batch.append((name, transform(opened)))
        if len(batch) == batch_size:
            flush()
    flush()
    return predictions


def _prediction(name: str, scores: torch.Tensor, names: Sequence[str] | None, top: int) -> Prediction:
    best = scores.topk(min(top, len(scores)))
    indices = tuple(int(i) for i in best.indices)
    classes = tuple(names[i] if names is not None and i < len(names) else str(i) for i in indices)
    return Prediction(name, classes, tuple(float(p) for p in best.values), indices)


def _named(images: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The name of each image, and its path or PIL image."""
    for position, image in enumerate(images):
        if not isinstance(image, str | os.PathLike):
            yield str(position), image
        elif not os.fspath(image) or not Path(image).is_dir():  # Path('') is the current directory
            yield os.fspath(image), image
        else:
            data = require("gspn.data")
            files, left_out = data.image_files(image)
            if left_out:
                warnings.warn(f"{printable(image)}: {left_out}", data.LeftOutWarning, stacklevel=4)
            if not files:
                raise UsageError(f"{printable(image)} holds no images; {left_out}.")
            for file in files:
                yield str(Path(image) / file), Path(image) / file


def _open(name: str, image: Any) -> Any:
    """The image in RGB, or the reason why it cannot be read."""
    data = require("gspn.data")
    try:
        if isinstance(image, str | os.PathLike):
            return data.load_image(image)
        if hasattr(image, "getexif"):
            return data.to_rgb(image, name=name)
    except data.CorruptImageError as error:
        return error.reason
    except OSError as error:
        return error.strerror or str(error)
    raise TypeError(f"image {name} is a {type(image).__name__}; pass paths, or PIL images.")
