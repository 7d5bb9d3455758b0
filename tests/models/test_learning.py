"""A model learns: handwritten digits in seconds."""

from __future__ import annotations

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import gspn.models  # noqa: F401  (registers the models)


def test_digits() -> None:
    digits = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(digits.target)))
    x = F.interpolate(torch.from_numpy(digits.images).float()[:, None] / 8 - 1, size=16, mode="bilinear")[order]
    y = torch.from_numpy(digits.target)[order]
    train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]
    torch.manual_seed(0)
    model = timm.create_model("gspn_pico", in_chans=1, num_classes=10)
    steps, batch = 80, 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(train_x), (batch,))
        loss = F.cross_entropy(model(train_x[chosen]), train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        accuracy = (model.eval()(test_x).argmax(1) == test_y).float().mean().item()
    assert accuracy >= 0.9
