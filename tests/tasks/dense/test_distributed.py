"""Two processes: the same run as one with twice the batch, the same scores, and one of them writes and prints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gspn.tasks.dense import evaluate, train
from tasks.dense.dense_runs import tiny
from tasks.processes import start_many
from tasks.runs import rows

pytestmark = pytest.mark.slow

# Every pixel counts, so that the mean over a batch is the mean of those over its halves. Not by Adam, which makes of a
# gradient of nearly 0, and of its rounding, a step as long as any.
SETTINGS = (
    "data.options.labels=depth", "data.options.unit=m", "data.options.ignore=null", "augment.scale=[1, 1.25]",
    "augment.color_jitter=0", "ema.decay=0.9", "optim.name=sgd", "optim.lr=0.05",
)  # fmt: skip


def two_processes(shapes, output) -> None:
    train(tiny(shapes, output / "two", *SETTINGS, "data.batch_size=4", "optim.accumulate=2"))
    evaluation = evaluate(output / "two", data="folder", root=shapes, options={"labels": "depth", "unit": "m"})
    if evaluation.is_main:
        evaluation.write_json(output / "evaluation.json")


def test_two_processes_are_one_with_twice_the_batch(shapes, tmp_path):
    start_many(2, tmp_path / "printed.txt", two_processes, shapes, tmp_path)
    assert (tmp_path / "printed.txt").read_text().count("epoch 2/2") == 1
    train(tiny(shapes, tmp_path / "one", *SETTINGS, "data.batch_size=16"))
    for row, other in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in ("lr", "train_loss", "mae", "rmse", "abs_rel"):
            assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-4), key
    ours, theirs = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("two", "one"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    alone = evaluate(tmp_path / "two", data="folder", root=shapes, options={"labels": "depth", "unit": "m"})
    assert found["images"] == alone.images == 4
    assert found["scores"]["pixels"] == alone.scores.pixels
    assert found["scores"]["mae"] == pytest.approx(alone.scores.mae, rel=1e-6)
