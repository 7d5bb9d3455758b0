"""Evaluating a classifier: :func:`evaluate`."""

from __future__ import annotations

import inspect
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..._errors import UsageError, require
from ..._files import write_text
from ..core.devices import make_accelerator, peak_memory_mib, process_info, to_device
from ..core.loaders import class_names, open_data, share_loader, with_classes
from ..core.progress import progress_bar
from .model import Fit, label_names, load_model, resolve_preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["fp32", "bf16", "fp16"]


class ClassesWarning(UserWarning):
    """The classes of data and of a model could not be matched by their names."""


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`; accuracies are in percent."""

    model: str
    data: str
    split: str
    images: int
    top1: float
    top5: float
    loss: float
    """Mean cross-entropy."""
    classes: tuple[str, ...]
    """Names, in the order of ``per_class`` and ``confusion``."""
    per_class: tuple[float | None, ...]
    """Top-1 accuracy on the images of each class; None for a class without images."""
    confusion: tuple[tuple[int, ...], ...]
    """``confusion[i][j]`` images of class i were classified as class j."""
    images_per_second: float
    """Throughput of loading and the model together."""
    model_images_per_second: float
    """Throughput of the model alone, on a batch that is already on the device."""
    peak_memory_mib: float
    """Allocated on the CUDA device, else occupied by the process."""
    parameters: int
    """Those that are trainable."""
    device: str
    precision: Precision
    batch_size: int
    fit: Fit = "crop"
    """How the images were brought to the model."""
    broken: tuple[str, ...] = ()
    """Names of images in this process's share that could not be read; they do not count."""
    is_main: bool = True
    """Whether this is the process that writes and prints."""

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
    fit: Fit = "crop",
    console: Console | None = None,
) -> Evaluation:
    """Accuracy, confusions and speed of a trained classifier on a data set.

    Images are resized, cropped and normalised as the model's configuration says; ``fit`` leaves out the crop, or the
    resize too. Batches of images of several sizes are padded, and each image is classified as if it were alone, which
    needs a model of :mod:`gspn.models`. Under ``torchrun`` each process evaluates a share of the images, and each
    returns the result of all.

    Args:
        model: A name or path that :func:`~gspn.tasks.classify.model.load_model` accepts, or a timm model.
        data: A name that :func:`gspn.data.open_dataset` knows.
        root: Directory of the data, for those that do not come with the package.
        split: Split of the data.
        options: Further arguments of ``open_dataset``.
        batch_size: Images per forward pass.
        workers: Processes that load images; 0 loads in this one.
        precision: `bf16` and `fp16` use autocast.
        device: `auto` uses a GPU if there is one.
        channels_last: Use this memory format for images and weights.
        fit: `crop`: the model's own resize and crop. `whole`: the same resize, which keeps the aspect ratio, and no
            crop. `native`: no resize and no crop, so that objects have the size that they have in the files.
        console: Shows a progress bar if it is a terminal; none by default.

    Raises:
        UsageError: the model or the data cannot be found, they differ in the number of classes, or the model does not
            take images of several sizes in a batch.
        MissingExtraError: a package of ``gspn[train]`` is not installed.

    Example:
        >>> from gspn.tasks.classify import evaluate
        >>> evaluate("runs/digits_pico/best", data="digits").top1  # doctest: +SKIP
        96.4
    """
    require("accelerate", "timm", "torchvision", "torchmetrics", "safetensors")
    from torchmetrics.classification import MulticlassConfusionMatrix

    classifier = model.eval() if isinstance(model, nn.Module) else load_model(model)
    if fit != "crop" and "valid_size" not in inspect.signature(classifier.forward).parameters:
        raise UsageError(
            f"fit={fit!r} pads images of several sizes, which {type(classifier).__name__} does not take; use a model "
            "of gspn.models, or fit='crop'."
        )
    options = dict(options or {})
    own_names = label_names(classifier)
    count = int(classifier.num_classes)  # type: ignore[arg-type]
    if own_names is None:
        dataset = open_data(data, split, root, **options)
    else:
        dataset, warning = with_classes(data, split, root, own_names, **options)
        if warning is not None:
            warnings.warn(warning, ClassesWarning, stacklevel=2)
    names = class_names(dataset)
    if len(names) != count:
        raise UsageError(
            f"the model has {count} classes and data {data!r} has {len(names)}; evaluate it on the data it was trained "
            "on."
        )
    accelerator = make_accelerator(precision=precision, device=device)
    where = accelerator.device
    classifier = classifier.to(where)
    if channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset.transform = resolve_preprocessing(classifier).transform(fit)
    info = process_info(accelerator)
    loader = share_loader(dataset, batch_size=batch_size, workers=workers, padded=fit != "crop", **info)
    confusions = MulticlassConfusionMatrix(count).to(where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    started = time.perf_counter()
    with progress_bar(console if accelerator.is_main_process else None, "evaluating", len(loader)) as advance:

        def watch(logits: Tensor, targets: Tensor) -> None:
            if len(targets):
                confusions.update(logits, targets)
            advance(1)

        accuracy = evaluate_batches(classifier, loader, accelerator, channels_last=channels_last, watch=watch)
        confusion = confusions.compute().cpu()  # [K, K], of all processes
    seconds = time.perf_counter() - started
    totals = confusion.sum(1)
    return Evaluation(
        model=str(model) if not isinstance(model, nn.Module) else type(model).__name__,
        data=data,
        split=split,
        **accuracy,
        classes=tuple(names),
        per_class=tuple(100 * int(confusion[i, i]) / int(totals[i]) if totals[i] else None for i in range(count)),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        images_per_second=len(dataset) / seconds,
        model_images_per_second=_model_speed(classifier, loader, accelerator, channels_last),
        peak_memory_mib=peak_memory_mib(where),
        parameters=sum(one.numel() for one in classifier.parameters() if one.requires_grad),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        precision=precision,
        batch_size=batch_size,
        fit=fit,
        broken=tuple(loader.broken.names.values()),
        is_main=accelerator.is_main_process,
    )


@torch.inference_mode()
def _model_speed(model: nn.Module, loader: Any, accelerator: Any, channels_last: bool) -> float:
    """Images per second through the model alone, all processes together, on one batch repeatedly."""
    size = resolve_preprocessing(model).input_size
    batch = min(loader.share.batch_size, len(loader.loader.dataset))
    images = torch.zeros(batch, *size, device=accelerator.device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with accelerator.autocast():
            model(images)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)

    forward()  # warm up
    times = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < 0.5:
        before = time.perf_counter()
        forward()
        times.append(time.perf_counter() - before)
    return accelerator.num_processes * batch / statistics.median(times)


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    accelerator: Accelerator,
    *,
    channels_last: bool = False,
    watch: Callable[[Tensor, Tensor], object] | None = None,
) -> dict[str, Any]:
    """``loss``, ``top1`` and ``top5`` (in percent) and number of ``images`` over the batches of all processes.

    A batch is ``(images, targets)``, or ``(images, sizes, targets)``, with the model's ``valid_size``. Images whose
    target is -1 do not count. Every process needs the same number of batches. ``watch`` is called with
    the logits ``[B, K]`` and the targets ``[B]`` that count, on the device.
    """
    was_training = model.training
    model.eval()
    # Apple's GPU has no float64, which sums of millions of losses need.
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, *sizes, targets in batches:
        images = to_device(images, accelerator.device, channels_last)
        targets, *sizes = (one.to(accelerator.device, non_blocking=True) for one in (targets, *sizes))
        with accelerator.autocast():
            logits = model(images, *sizes)
        logits = logits.float()  # [B, K]
        counts = targets >= 0
        logits, targets = logits[counts], targets[counts]
        if watch is not None:
            watch(logits, targets)
        correct = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # [B, 5]
        batch = (F.cross_entropy(logits, targets, reduction="sum"), correct[:, 0].sum(), correct.sum(), counts.sum())
        sums += torch.stack([one.to(sums) for one in batch])
    model.train(was_training)
    loss, top1, top5, images = accelerator.reduce(sums, "sum").tolist()  # type: ignore[union-attr]
    most = max(images, 1)
    return {"loss": loss / most, "top1": 100 * top1 / most, "top5": 100 * top5 / most, "images": int(images)}
