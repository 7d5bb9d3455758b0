"""Small runs for the tests: a folder of images with captions, and a teacher with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from gspn.tasks.text_to_image.distill import DistillConfig
from gspn.tasks.text_to_image.train import TextToImageConfig

SHARED: dict[str, Any] = {
    "data": {"name": "folder", "size": 32, "batch_size": 4, "encode_batch_size": 8, "workers": 0, "eval_split": "val"},
    "samples": {"every": 1, "number": 2, "steps": 2, "guidance": 2.0},
    "schedule": {"epochs": 2},
    "ema": {"decay": 0.9},
    "run": {"trackers": [], "device": "cpu"},
}
COLOURS = ("red", "green", "blue", "teal")


def make_folder(root: Path, train: int = 16, val: int = 4) -> Path:
    """Squares of a colour, said twice."""
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            colour = COLOURS[i % len(COLOURS)]
            image = Image.new("RGB", (32, 32), "white")
            image.paste(Image.new("RGB", (8 + i, 16), colour), (4, 8))
            image.save(root / split / f"{i:02d}.png")
            (root / split / f"{i:02d}.txt").write_text(f"{colour}\na {colour}\n")
    return root


def tiny_distill(teacher: Path, root: Path, output: Path, *overrides: str) -> DistillConfig:
    config = DistillConfig.from_values(
        {**SHARED, "teacher": str(teacher), "optim": {"lr": 2e-3, "lr_base_batch": None}}
    )
    return config.changed(*overrides, **{"run.output": output, "data.root": root})


def tiny_train(vae: Path, text: Path, root: Path, output: Path, *overrides: str) -> TextToImageConfig:
    model = {
        "vae": str(vae),
        "text": str(text),
        "options": {
            "block_out_channels": [8, 16],
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
    }
    config = TextToImageConfig.from_values({**SHARED, "model": model, "optim": {"lr": 2e-3, "lr_base_batch": None}})
    return config.changed(*overrides, **{"run.output": output, "data.root": root})
