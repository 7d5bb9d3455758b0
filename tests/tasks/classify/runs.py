"""Small runs for the tests: a small ConvNeXt of timm on handwritten digits, which it learns in seconds."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

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

# What a resumed run cannot have in common with an uninterrupted one.
_TIMES = ("seconds", "images_per_second", "peak_memory_mib")


def tiny(output: Path, *overrides: str) -> TrainConfig:
    return TrainConfig.from_values(TINY).changed(*overrides, **{"run.output": output})


def rows(output: Path, *, timeless: bool = True) -> list[dict[str, str]]:
    with (output / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not (timeless and k in _TIMES)} for row in found]


def newest_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimiser of the newest checkpoint."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    state = {f"weights.{k}": v for k, v in load_file(newest / "model.safetensors").items()}
    average = newest / "custom_checkpoint_0.pkl"
    if average.exists():
        state |= {f"average.{k}": v for k, v in torch.load(average, weights_only=True).items()}
    optimizer = torch.load(newest / "optimizer.bin", weights_only=True)["state"]
    for i, moments in optimizer.items():
        state |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    return state


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different
