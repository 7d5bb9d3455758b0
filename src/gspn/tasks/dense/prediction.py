"""Applying a model of dense prediction to images: :func:`predict`."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..._errors import UsageError, require
from ..._files import printable, replaced
from ..core.devices import inference_device
from .drawing import colour_map, legend, overlay
from .inference import Windows, predict_rows, to_map
from .model import DenseModel, Target, load_model

_MOST_INDICES = 256  # of a palette
_LEGEND = "legend.png"


@dataclass(frozen=True)
class Prediction:
    """The prediction of an image.

    Attributes:
        image: The file.
        map: The file of the map; None if there is none.
        overlay: The file of the overlay, if one was written.
        seconds: The time of the model.
        broken: Why the image could not be read, or predicted; else None.
    """

    image: str
    map: str | None = None
    overlay: str | None = None
    seconds: float = 0.0
    broken: str | None = None


def predict(
    images: Sequence[str | os.PathLike[str]],
    model: str | Path | DenseModel,
    output: str | Path,
    *,
    window: int | None = None,
    overlap: float = 0.25,
    batch_size: int = 4,
    overlays: bool = True,
    device: Literal["auto", "cpu"] = "auto",
    progress: Callable[[str, int], Any] | None = None,
) -> list[Prediction]:
    """Predict the maps of images, and write them.

    A map of classes is a PNG whose palette has their colours, so that its values are the classes; one of more than 256
    classes has 16 bits of grey. A map of numbers is a TIFF in float32. :func:`gspn.data.load_map` reads all of them.
    An overlay is the image under the colours of the map, and ``legend.png`` names the colours.

    Args:
        images: Files. A folder stands for the images in it.
        model: A directory that :func:`~gspn.tasks.dense.model.load_model` accepts, or a model.
        output: The directory to write to.
        window: Side of the windows in pixels; None for the crops of the training, 0 for whole images.
        overlap: Part of a window that the next one covers again.
        batch_size: Windows per forward pass.
        overlays: Whether to write overlays and the legend.
        device: `auto` uses a GPU if there is one.
        progress: Called with the name and the number of windows of each image; its result is a context whose value is
            called with the number of windows that are done, such as a progress bar.

    Returns:
        One prediction for each image, in order. For an image that cannot be read, or that is of a size that the model
        does not take, ``broken`` is set.

    Raises:
        UsageError: the model cannot be named, a folder has no images, or a file to write is also one of the images, or
            that of another image.
        OSError: the directory cannot be written.
        MissingExtraError: a package of ``gspn[dense]`` is not installed.
    """
    require("timm", "safetensors")
    net = model.eval() if isinstance(model, DenseModel) else load_model(model)
    where = inference_device(device)
    net = net.to(where)
    windows = Windows(net.target.size if window is None else window, overlap, batch_size)
    named, output = _named(images), Path(output)
    files = _files(named, output, ".png" if net.target.classes else ".tif", overlays)
    predictions = []
    for name, path in named.items():
        opened = _open(path)
        if isinstance(opened, str):
            predictions.append(Prediction(os.fspath(path), broken=opened))
            continue
        started = time.perf_counter()
        try:
            values = _predicted(np.asarray(opened), net, windows, where, printable(name), progress)
        except UsageError as error:  # the encoder does not take an image of this size
            predictions.append(Prediction(os.fspath(path), broken=str(error)))
            continue
        seconds = time.perf_counter() - started
        map_file, overlay_file = files[name]
        save_map(values, net.target, map_file)
        if overlay_file is not None:
            drawn = values.astype(np.float32)
            coloured = overlay(opened, drawn, net.target) if net.target.classes else colour_map(drawn, net.target)
            with replaced(overlay_file) as part:
                coloured.save(part, format="PNG")
        predictions.append(
            Prediction(os.fspath(path), str(map_file), overlay_file and str(overlay_file), round(seconds, 3))
        )
    if overlays and any(one.broken is None for one in predictions):
        with replaced(output / _LEGEND) as part:
            legend(net.target).save(part, format="PNG")
    return predictions


def save_map(values: NDArray[Any], target: Target, path: Path) -> None:
    """Write a map, replacing the file as a whole."""
    if not target.classes:
        image, form = Image.fromarray(values.astype(np.float32)), "TIFF"
    elif len(target.classes) <= _MOST_INDICES:
        image, form = Image.fromarray(values.astype(np.uint8)).convert("P"), "PNG"
        image.putpalette([part for colour in target.colours for part in colour])
    else:
        image, form = Image.fromarray(values.astype(np.uint16)), "PNG"
    with replaced(path) as part:
        image.save(part, format=form)


def _predicted(
    image: NDArray[np.uint8], model: DenseModel, windows: Windows, device: torch.device, name: str, progress: Any
) -> NDArray[Any]:
    values: NDArray[Any] = np.empty(image.shape[:2], np.uint16 if model.target.classes else np.float32)
    total = len(windows.starts(image.shape[0])) * len(windows.starts(image.shape[1]))

    def fill(advance: Callable[[int], object] | None) -> None:
        for top, outputs in predict_rows(image, model, windows, device=device, advance=advance):
            rows = to_map(outputs, model).cpu().numpy()
            values[top : top + len(rows)] = rows

    if progress is None:
        fill(None)
    else:
        with progress(name, total) as advance:
            fill(advance)
    return values


def _named(images: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """The images by the names of their maps, without an ending."""
    data = require("gspn.data")
    named: dict[str, Path] = {}

    def files() -> Iterator[tuple[str, Path]]:
        for image in images:
            if not os.fspath(image) or not Path(image).is_dir():  # Path('') is the current directory
                yield Path(image).name, Path(image)
                continue
            inside, left_out = data.image_files(image)
            if left_out:
                warnings.warn(f"{printable(image)}: {left_out}", data.LeftOutWarning, stacklevel=4)
            if not inside:
                raise UsageError(f"{printable(image)} holds no images; {left_out}.")
            yield from ((file, Path(image) / file) for file in inside)

    for name, path in files():
        stem = os.path.splitext(name)[0] or name  # noqa: PTH122  (names of any bytes, with folders)
        if stem in named:
            raise UsageError(
                f"{printable(named[stem])} and {printable(path)} would both be written as {printable(stem)}; predict "
                "them into two directories."
            )
        named[stem] = path
    return named


def _files(named: Mapping[str, Path], output: Path, ending: str, overlays: bool) -> dict[str, tuple[Path, Path | None]]:
    """The files of the map and of the overlay of each image.

    Raises:
        UsageError: one of them is an image to predict, or that of another image too.
    """
    files = {name: (output / f"{name}{ending}", output / f"{name}.overlay.png" if overlays else None) for name in named}
    images = {os.path.realpath(path) for path in named.values()}
    written = {os.path.realpath(output / _LEGEND)} if overlays else set()
    if images & written:
        raise UsageError(f"{printable(output / _LEGEND)} is to be predicted, and would be overwritten by the legend.")
    for name, path in named.items():
        for file in filter(None, files[name]):
            real = os.path.realpath(file)
            if real in images:
                raise UsageError(f"{printable(file)} is to be predicted, and would be overwritten; write to another "
                                 "directory.")  # fmt: skip
            if real in written:
                raise UsageError(
                    f"{printable(path)} would be written as {printable(file)}, which is a legend or of another image "
                    "too; rename it, or write maps only."
                )
            written.add(real)
    return files


def _open(path: Path) -> Any:
    """The image in RGB, or the reason why it cannot be read."""
    data = require("gspn.data")
    try:
        return data.load_image(path)
    except data.CorruptImageError as error:
        return error.reason
    except OSError as error:
        return error.strerror or str(error)
