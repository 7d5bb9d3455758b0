"""Two connected processes: the loss of one with twice the batch, and the images of one."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from gspn.tasks.class_conditional import sample, train
from tasks.class_conditional.class_conditional_runs import tiny
from tasks.processes import start_many

SETTINGS = ["schedule.epochs=1", "samples.every=0", "data.eval_split=val", "ema.decay=null", "data.sizes=[8, 16]"]


def train_share(output):
    train(tiny(output, *SETTINGS, "data.batch_size=32"), console=None)


def draw_share(pipeline, output):
    sample(pipeline, output=output, number=7, steps=3, seed=4, batch_size=2, device="cpu")


def rows(output):
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_two_processes_train_and_draw_as_one(tmp_path):
    torch.set_num_threads(1)
    train(tiny(tmp_path / "one", *SETTINGS))
    start_many(2, tmp_path / "printed", train_share, tmp_path / "two")
    [one], [two] = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert (one["step"], two["step"]) == ("22", "22")
    # Noise and times are drawn by each process: the same data, not the same loss to the last digit.
    assert float(two["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=0.1)

    sample(tmp_path / "one", output=tmp_path / "alone", number=7, steps=3, seed=4, device="cpu")
    start_many(2, tmp_path / "printed", draw_share, tmp_path / "one", tmp_path / "shared")
    names = [path.name for path in sorted((tmp_path / "alone").glob("*.png"))]
    assert len(names) == 8 and names == [path.name for path in sorted((tmp_path / "shared").glob("*.png"))]
    for name in names:
        alone, shared = (np.asarray(Image.open(tmp_path / place / name)).astype(int) for place in ("alone", "shared"))
        assert abs(alone - shared).max() <= 1
