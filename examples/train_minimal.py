"""A whole training run from top to bottom in plain PyTorch: a small GSPN classifier on handwritten digits.

    python examples/train_minimal.py --epochs 4 --output runs/minimal.pt

Each step stands here once, without the loop of ``gspn.tasks``. That loop adds what longer runs need: augmentation,
exact resuming, several GPUs, mixed precision, trackers. See ``gspn classify train``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gspn.models  # noqa: F401
from gspn.data import Digits


def load_digits(split: str, size: int) -> TensorDataset:
    """Images ``[N, 1, size, size]`` in about [-1, 1], and their classes ``[N]``."""
    digits = Digits(split)
    pixels = np.stack([np.asarray(image.convert("L")) for image, _ in digits])  # [N, 8, 8]
    images = torch.from_numpy(pixels)[:, None] / 127.5 - 1
    # The model halves the resolution several times, so the 8 pixels are enlarged.
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    return TensorDataset(images, torch.tensor(digits.targets))


@torch.inference_mode()
def accuracy(model: nn.Module, data: DataLoader[tuple[Tensor, ...]]) -> float:
    """The share of images, in percent, whose class has the highest score."""
    model.eval()
    correct = [model(images).argmax(dim=1) == labels for images, labels in data]
    return 100 * torch.cat(correct).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print a line per epoch, save the weights, and return the accuracy on unseen digits in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    parser.add_argument("--size", type=int, default=16, help="height and width of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="images per update")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--output", type=Path, default=Path("runs/minimal.pt"), help="file of the trained weights")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    # 1. Data: 1,433 digits to train on, 364 to evaluate on.
    train = DataLoader(load_digits("train", options.size), options.batch_size, shuffle=True, drop_last=True)
    held_out = DataLoader(load_digits("val", options.size), batch_size=100)

    # 2. Model: importing gspn.models has registered it with timm.
    model = timm.create_model("gspn_pico", num_classes=10, in_chans=1)

    # 3. Optimizer and schedule: warm up for a tenth of the updates, then decay to zero.
    updates = options.epochs * len(train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=updates, pct_start=0.1)

    # 4. Epochs of updates: forward, loss, backward, step.
    score = 0.0
    for epoch in range(1, options.epochs + 1):
        begin, total = time.perf_counter(), 0.0
        model.train()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        # 5. Evaluation on the digits that are held out.
        seconds, score = time.perf_counter() - begin, accuracy(model, held_out)
        print(f"epoch {epoch}/{options.epochs}  loss {total / len(train):.3f}  top-1 {score:.1f} %  {seconds:.1f} s")

    # 6. Save; `model.load_state_dict(torch.load(path, weights_only=True))` reads it back.
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), options.output)
    print(f"wrote {options.output}")
    return score


if __name__ == "__main__":
    main()
