"""The demo's own plots."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gspn._figures import label, save_figure
from gspn.tasks.classify import Prediction

INK, MUTED, RIGHT, WRONG = "#1f2430", "#5b6270", "#1a7f4b", "#c6372e"


def learning_curve(metrics: Path, output: Path) -> None:
    """Loss and accuracy over the epochs of a training run, from its table."""
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(epochs, [float(row["ema_top1"]) for row in rows], "o-", color="#2b5fd9", label="averaged weights")
    upper.plot(epochs, [float(row["top1"]) for row in rows], "o-", color="#e08a1e", label="weights")
    upper.set_ylabel("test accuracy, %")
    upper.legend(frameon=False, loc="lower right", fontsize=9)
    lower.plot(epochs, [float(row["train_loss"]) for row in rows], "o-", color=INK, label="training")
    lower.plot(epochs, [float(row["eval_loss"]) for row in rows], "o-", color="#e08a1e", label="test")
    lower.set_ylabel("loss")
    lower.set_xlabel("epoch")
    lower.set_xticks(epochs)
    lower.legend(frameon=False, fontsize=9)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=MUTED)
        axis.grid(axis="y", alpha=0.25)
    save_figure(figure, output, dpi=150)


def prediction_grid(
    images: Sequence[Any], predictions: Sequence[Prediction], truths: Sequence[str], output: Path, *, columns: int
) -> None:
    """Images with their predicted class and its probability, green where it is right and red where it is wrong."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(10.8, 10.8 / columns * 1.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, prediction, truth in zip(axes.flat, images, predictions, truths, strict=False):
        axis.imshow(image, interpolation="nearest" if max(image.size) < 48 else "lanczos")
        right = prediction.classes[0] == truth
        guess, share = prediction.classes[0], f"{prediction.probabilities[0]:.0%}"
        guess, truth = label(guess), label(truth)
        title = f"{guess}\n{share}" if right else f"{guess} {share}\nis {truth}"
        axis.set_title(title, fontsize=10 if columns > 10 else 7, color=RIGHT if right else WRONG, pad=3)
    save_figure(figure, output, dpi=150)
