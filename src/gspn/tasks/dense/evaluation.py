"""Evaluating a model of dense prediction: :func:`evaluate`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from ..._errors import UsageError, require
from ..._files import write_text
from ..core.devices import make_accelerator, peak_memory_mib, process_info
from ..core.loaders import EvalLoader, share_loader
from ..core.progress import progress_bar
from .data import open_split
from .inference import Windows, predict_map
from .metrics import ClassScores, NumberScores, make_sums
from .model import DenseModel, Target, load_model
from .transforms import WholeImage, separate

Precision = Literal["fp32", "bf16", "fp16"]
Scores = ClassScores | NumberScores


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`."""

    model: str
    data: str
    split: str
    images: int
    scores: Scores
    classes: tuple[str, ...]
    """Names, in the order of the scores; empty for numbers."""
    unit: str | None
    """The unit of the numbers."""
    window: int
    """Side of the windows in pixels; 0: whole images."""
    overlap: float
    megapixels_per_second: float
    """Throughput of loading, the model and the metrics together."""
    peak_memory_mib: float
    """Allocated on the CUDA device, else occupied by the process."""
    parameters: int
    device: str
    precision: Precision
    broken: tuple[str, ...] = ()
    """Names of images in this process's share that could not be read; they do not count."""
    is_main: bool = True
    """Whether this is the process that writes and prints."""

    def write_json(self, path: Path) -> None:
        """Write everything as JSON, replacing the file as a whole."""
        write_text(path, json.dumps(asdict(self), indent=1))

    def worst_classes(self, count: int = 5) -> list[tuple[str, float]]:
        """The classes with the lowest intersection over union, worst first; empty for numbers."""
        if not isinstance(self.scores, ClassScores):
            return []
        known = [(name, value) for name, value in zip(self.classes, self.scores.iou, strict=True) if value is not None]
        return sorted(known, key=lambda one: one[1])[:count]


def evaluate(
    model: str | Path | DenseModel,
    *,
    data: str,
    root: str | Path | None = None,
    split: str = "val",
    options: dict[str, Any] | None = None,
    window: int | None = None,
    overlap: float = 0.25,
    batch_size: int = 4,
    workers: int = 0,
    precision: Precision = "fp32",
    device: Literal["auto", "cpu"] = "auto",
    console: Console | None = None,
) -> Evaluation:
    """The quality of a model's maps on a data set, and its speed.

    Under ``torchrun`` each process evaluates a share of the images, and each returns the result of all.

    Args:
        model: A directory that :func:`~gspn.tasks.dense.model.load_model` accepts, or a model.
        data: A name that :func:`gspn.data.open_maps` knows.
        root: Directory of the data, for those that need one.
        split: Split of the data.
        options: Further arguments of ``open_maps``.
        window: Side of the windows in pixels; None for the crops of the training, 0 for whole images.
        overlap: Part of a window that the next one covers again.
        batch_size: Windows per forward pass.
        workers: Processes that load images; 0 loads in this one.
        precision: `bf16` and `fp16` use autocast.
        device: `auto` uses a GPU if there is one.
        console: Shows a progress bar if it is a terminal; none by default.

    Raises:
        UsageError: the model or the data cannot be found, or have other classes or another unit.
        MissingExtraError: a package of ``gspn[dense]`` is not installed.
    """
    require("accelerate", "timm", "torchmetrics", "safetensors")
    net = model.eval() if isinstance(model, DenseModel) else load_model(model)
    dataset = open_split(data, split, root, **(options or {}))
    check_same(net.target, dataset)
    accelerator = make_accelerator(precision=precision, device=device)
    where = accelerator.device
    net = net.to(where)
    dataset.transform = WholeImage(net.target.normalization)
    loader = share_loader(dataset, batch_size=1, workers=workers, **process_info(accelerator))
    windows = Windows(net.target.size if window is None else window, overlap, batch_size)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    pixels, started = 0, time.perf_counter()
    with progress_bar(console if accelerator.is_main_process else None, "evaluating", len(loader)) as advance:

        def watch(image: Tensor, target: Tensor, predicted: Tensor) -> None:
            nonlocal pixels
            del image, predicted
            pixels += target.numel()
            advance(1)

        scores = evaluate_images(net, loader, windows, accelerator, watch=watch)
    seconds = time.perf_counter() - started
    return Evaluation(
        model=type(model).__name__ if isinstance(model, DenseModel) else str(model),
        data=data,
        split=split,
        images=len(dataset),
        scores=scores,
        classes=tuple(net.target.classes),
        unit=net.target.unit,
        window=windows.size,
        overlap=overlap,
        megapixels_per_second=pixels / 1e6 / seconds * accelerator.num_processes,
        peak_memory_mib=peak_memory_mib(where),
        parameters=sum(one.numel() for one in net.parameters()),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        precision=precision,
        broken=tuple(loader.broken.names.values()),
        is_main=accelerator.is_main_process,
    )


def check_same(target: Target, dataset: Any) -> None:
    """Refuse data whose classes or unit are not those of the model."""
    for what, own, other in (("classes", target.classes, dataset.classes), ("unit", target.unit, dataset.unit)):
        if own != other:
            raise UsageError(
                f"the model has the {what} {_some(own)}, and data {dataset.name!r} has {_some(other)}; evaluate it on "
                "data like those it was trained on."
            )


def _some(value: Any) -> str:
    if not isinstance(value, list):
        return repr(value)
    return f"{', '.join(map(repr, value[:8]))}{', ...' if len(value) > 8 else ''}" if value else "of none"


def evaluate_images(
    model: DenseModel, loader: EvalLoader, windows: Windows, accelerator: Any,
    watch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
) -> Scores:  # fmt: skip
    """The scores over the images of all processes, one image a batch.

    ``watch`` is called with the normalised image ``[3, H, W]``, its map and the predicted map ``[H, W]`` of each.
    """
    training = model.training
    model.eval()
    sums = make_sums(model.target)

    def forward(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(images)

    for samples, indices in loader:
        if indices[0] < 0:  # corrupt, or one that fills up another process's share
            continue
        images, targets = separate(samples)
        predicted = predict_map(images[0], model, windows, device=accelerator.device, forward=forward)
        sums.add(predicted, targets[0])
        if watch is not None:
            watch(images[0], targets[0], predicted)
    model.train(training)
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
    return sums.scores(accelerator.reduce(sums.sums.to(device), "sum").tolist())
