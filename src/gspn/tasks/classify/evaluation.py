"""Evaluating a classifier: :func:`evaluate`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from ..._files import write_text
from ..core.devices import make_accelerator
from ..core.errors import UsageError, require
from ..core.loaders import class_names, open_data
from ..core.progress import progress_bar
from ..core.records import peak_memory_mib
from .loaders import eval_loader
from .model import count_parameters, label_names, load_model, resolve_preprocessing
from .steps import evaluate_batches

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found; accuracies in percent.

    Attributes:
        model: As it was named.
        data: Likewise.
        split: Of the data.
        images: How many counted.
        top1: Images whose class has the highest score.
        top5: Images whose class is among the five highest.
        loss: Mean cross-entropy.
        classes: Names, in the order of what follows.
        per_class: Top-1 of the images of each class; None for a class without images.
        confusion: ``confusion[i][j]`` images of class i were taken for class j.
        images_per_second: Of loading and the network together.
        network_images_per_second: Of the network alone, on batches that are already on the device.
        peak_memory_mib: Allocated on the CUDA device, or occupied by the process.
        parameters: Of the network.
        device: What computed.
        precision: Of the network's arithmetic.
        batch_size: Images in a forward pass.
        broken: Names of images that could not be read, which do not count; those of this process's share.
        is_main: Whether this is the process that writes and prints.
    """

    model: str
    data: str
    split: str
    images: int
    top1: float
    top5: float
    loss: float
    classes: tuple[str, ...]
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    images_per_second: float
    network_images_per_second: float
    peak_memory_mib: float
    parameters: int
    device: str
    precision: Precision
    batch_size: int
    broken: tuple[str, ...] = ()
    is_main: bool = True

    def write_json(self, path: Path) -> None:
        """Write everything as JSON, replacing the file as a whole."""
        write_text(path, json.dumps(asdict(self), indent=1))

    def worst_classes(self, count: int = 5) -> list[tuple[str, float]]:
        """The classes with the lowest accuracy, worst first."""
        known = [(name, value) for name, value in zip(self.classes, self.per_class, strict=True) if value is not None]
        return sorted(known, key=lambda one: one[1])[:count]


def evaluate(
    model: str | Path | nn.Module,
    *,
    data: str,
    root: str | Path | None = None,
    split: str = "val",
    options: dict[str, Any] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
    device: Literal["auto", "cpu"] = "auto",
    channels_last: bool = False,
    console: Console | None = None,
) -> Evaluation:
    """Accuracy, confusions and speed of a trained classifier on a data set.

    Images are resized, cropped and normalised as the model's configuration says. Under ``torchrun`` each process takes
    a share of the images, and each returns the figures of all.

    Args:
        model: What :func:`~gspn.tasks.classify.model.load_model` finds, or a timm model.
        data: A name that :func:`gspn.data.open_dataset` knows.
        root: Where the data lie, for those that do not come with the package.
        split: Of the data.
        options: Further arguments of ``open_dataset``.
        batch_size: Images in a forward pass.
        workers: Processes that load images; 0 loads in this one.
        precision: `bf16` and `fp16` use autocast.
        device: `auto` takes a GPU if there is one.
        channels_last: Images and weights in that layout.
        console: Shows a bar if it is a terminal; none by default.

    Returns:
        The figures, with the class names of the data set.

    Raises:
        UsageError: the model or the data cannot be found, or they differ in the number of classes.
        MissingExtraError: a package of ``gspn[train]`` is not installed.

    Example:
        >>> from gspn.tasks.classify import evaluate
        >>> evaluate("runs/digits_pico/best", data="digits").top1  # doctest: +SKIP
        96.4
    """
    require("accelerate", "timm", "torchvision", "torchmetrics", "safetensors")
    from torchmetrics.classification import MulticlassConfusionMatrix

    network = model.eval() if isinstance(model, nn.Module) else load_model(model)
    options = dict(options or {})
    own_names = label_names(network)
    if data in ("", "folder") and own_names is not None:
        options.setdefault("classes", own_names)  # a folder that lacks a class shifts no other
    dataset = open_data(data, split, root, **options)
    names = class_names(dataset)
    count = int(network.num_classes)  # type: ignore[arg-type]
    if len(names) != count:
        raise UsageError(
            f"the model tells {count} classes apart and data {data!r} has {len(names)}; evaluate it on what it was "
            "trained on."
        )
    accelerator = make_accelerator(precision=precision, device=device)
    where = accelerator.device
    network = network.to(where)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = eval_loader(
        dataset,
        resolve_preprocessing(network),
        batch_size=batch_size,
        workers=workers,
        processes=accelerator.num_processes,
        process=accelerator.process_index,
        pin=where.type == "cuda",
    )
    confusions = MulticlassConfusionMatrix(count).to(where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    started = time.perf_counter()
    with progress_bar(console if accelerator.is_main_process else None, "evaluating", len(loader)) as advance:

        def watch(logits: Tensor, targets: Tensor) -> None:
            if len(targets):
                confusions.update(logits, targets)
            advance(1)

        figures = evaluate_batches(network, loader, accelerator, channels_last=channels_last, watch=watch)
        confusion = confusions.compute().cpu()  # [K, K], of all processes
    seconds = time.perf_counter() - started
    totals = confusion.sum(1)
    return Evaluation(
        model=str(model) if not isinstance(model, nn.Module) else type(model).__name__,
        data=data,
        split=split,
        images=figures.images,
        top1=figures.top1,
        top5=figures.top5,
        loss=figures.loss,
        classes=tuple(names),
        per_class=tuple(100 * int(confusion[i, i]) / int(totals[i]) if totals[i] else None for i in range(count)),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        images_per_second=len(dataset) / seconds,
        network_images_per_second=_network_speed(network, loader, accelerator, channels_last),
        peak_memory_mib=peak_memory_mib(where),
        parameters=count_parameters(network),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        precision=precision,
        batch_size=batch_size,
        broken=tuple(loader.broken.names.values()),
        is_main=accelerator.is_main_process,
    )


@torch.inference_mode()
def _network_speed(network: nn.Module, loader: Any, accelerator: Any, channels_last: bool) -> float:
    """Images a second through the network alone, all processes together, on one batch again and again."""
    size = resolve_preprocessing(network).input_size
    batch = min(loader.sampler.batch_size, len(loader.loader.dataset))
    images = torch.zeros(batch, *size, device=accelerator.device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with accelerator.autocast():
            network(images)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)

    forward()  # whatever is set up once
    times = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < 0.5:
        before = time.perf_counter()
        forward()
        times.append(time.perf_counter() - before)
    median = sorted(times)[len(times) // 2]
    return accelerator.num_processes * batch / median
