"""Small runs for the tests: discs and squares on noise, which a small ConvNeXt finds in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gspn.tasks.dense import DenseConfig
from gspn.tasks.dense.model import DenseModel, Target, build_model
from gspn.tasks.dense.transforms import Normalization

HALF = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES = Target(["ground", "disc", "square"], [(90, 90, 90), (200, 60, 40), (40, 90, 200)], None, 0.0, 1.0, HALF, 64)
NUMBERS = Target([], [], "m", 100.0, 20.0, HALF, 64)

TINY = {
    "data": {"name": "folder", "size": 64, "batch_size": 8, "workers": 0},
    "model": {
        "name": "test_convnext",
        "decoder": "FPN",
        "decoder_kwargs": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32, "decoder_dropout": 0.0},
    },
    "augment": {"scale": [0.8, 1.25], "hflip": 0.5, "vflip": 0.5, "color_jitter": 0.1},
    "optim": {"lr": 4e-3, "lr_base_batch": 8, "clip_grad": 5.0},
    "schedule": {"epochs": 2, "warmup_epochs": 0.5, "min_lr": 1e-5},
    "windows": {"window": 0},
    "run": {"trackers": [], "device": "cpu"},
}


def tiny(root: Path, output: Path, *overrides: str) -> DenseConfig:
    return DenseConfig.from_values(TINY).changed(*overrides, **{"data.root": root, "run.output": output})


def tiny_model(target: Target = CLASSES, *overrides: str) -> DenseModel:
    return build_model(DenseConfig.from_values(TINY).changed(*overrides).model, target).eval()


def write_shapes(root: Path, counts: dict[str, int], height: int = 64, width: int = 80) -> Path:
    """Images, label maps and, as ``depth``, numbers: 100 on the ground, 140 on a disc, 60 on a square."""
    for split, count in counts.items():
        for kind in ("images", "labels", "depth"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([len(split), i])
            rows, columns = np.mgrid[:height, :width]
            labels = np.zeros((height, width), np.uint8)
            y, x = rng.integers(12, height - 12), rng.integers(12, width - 12)
            labels[(rows - y) ** 2 + (columns - x) ** 2 < 144] = 1
            y, x = rng.integers(0, height - 20), rng.integers(0, width - 20)
            labels[y : y + 20, x : x + 20] = 2
            pixels = np.array(CLASSES.colours)[labels] + rng.normal(0, 15, (height, width, 3))
            labels[:2] = 255  # ignored
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{i}.png")
            numbers = np.array([100.0, 140.0, 60.0], np.float32)[labels % 255]
            np.save(root / split / "depth" / f"{i}.npy", numbers)
    (root / "classes.txt").write_text("\n".join(CLASSES.classes))
    return root
