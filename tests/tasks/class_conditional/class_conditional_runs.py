"""Small runs for the tests: a very small denoiser of handwritten digits of 8 pixels."""

from __future__ import annotations

from pathlib import Path

from gspn.tasks.class_conditional import ClassConditionalConfig

TINY = {
    "data": {"name": "digits", "size": 8, "channels": 1, "batch_size": 64, "workers": 0},
    "model": {"size": "T/2", "options": {"dim": 16, "num_layers": 2, "proxy_dim": 2}},
    "diffusion": {"timesteps": 100},
    "samples": {"every": 1, "columns": 2, "classes": 3, "steps": 3},
    "optim": {"lr": 2e-3, "lr_base_batch": None, "clip_grad": 1.0},
    "schedule": {"epochs": 2},
    "ema": {"decay": 0.9},
    "run": {"trackers": [], "device": "cpu"},
}


def tiny(output: Path, *overrides: str) -> ClassConditionalConfig:
    return ClassConditionalConfig.from_values(TINY).changed(*overrides, **{"run.output": output})
