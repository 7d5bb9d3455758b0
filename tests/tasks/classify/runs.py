"""Small runs for the tests: a small ConvNeXt of timm on handwritten digits, which it learns in seconds."""

from __future__ import annotations

from pathlib import Path

from gspn.tasks.classify import TrainConfig

TINY = {
    "data": {
        "name": "digits",
        "size": 32,
        "batch_size": 64,
        "workers": 0,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    },
    "model": {"name": "test_convnext"},
    "augment": {"crop": "none", "interpolation": "bilinear", "hflip": 0.0, "color_jitter": 0.0},
    "optim": {"lr": 4e-3, "lr_base_batch": 64, "clip_grad": 5.0},
    "schedule": {"epochs": 2, "warmup_epochs": 0.5, "min_lr": 1e-5},
    "run": {"trackers": [], "device": "cpu"},
}

# All that draws random numbers.
RANDOM = [
    "model.drop_path=0.2",
    "model.drop=0.1",
    "augment.affine.degrees=10",
    "augment.affine.translate=[0.1, 0.1]",
    "augment.re_prob=0.2",
    "augment.mixup=0.4",
    "augment.cutmix=1.0",
    "optim.label_smoothing=0.1",
    "ema.decay=0.9",
]


def tiny(output: Path, *overrides: str) -> TrainConfig:
    return TrainConfig.from_values(TINY).changed(*overrides, **{"run.output": output})
