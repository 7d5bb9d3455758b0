"""Several processes: the same run as one with as many images, and only one of them writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gspn.tasks.classify import evaluate, train
from tasks.classify.runs import tiny
from tasks.processes import shard_on_cpu, start_many
from tasks.runs import rows, stopped_before

SIZES = "data.sizes=[64, 32]"  # processes with different sizes would end with other weights
# For weights that are compared: Adam makes of a gradient of nearly 0, and of its rounding, a step as long as any.
SGD = ("optim.name=sgd", "optim.lr=0.05")
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Coloured noise: 36 images to train on and 11 to evaluate, one broken in each."""
    root = tmp_path_factory.mktemp("colours")
    dice = random.Random(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count - (name == "red" and split == "val")):
                image = Image.new("RGB", (10, 12), colour)
                image.putpixel((dice.randrange(10), dice.randrange(12)), (255, 255, 255))
                image.save(root / split / name / f"{i:02}.png")
        (root / split / "green" / "03.png").write_bytes(b"no image")
    return root


def settings(folder: Path, *more: str) -> list[str]:
    return ["data.name=folder", f"data.root={folder}", "schedule.epochs=2", "schedule.warmup_epochs=0", *more]


def two_processes(output: Path, folder: Path) -> None:
    accumulated = ("data.batch_size=4", "optim.accumulate=2", "ema.decay=0.9")
    train(tiny(output / "ddp", *settings(folder, SIZES, *SGD, *accumulated)))
    evaluation = evaluate(output / "ddp", data="folder", root=folder, batch_size=3, device="cpu")
    if evaluation.is_main:
        evaluation.write_json(output / "evaluation.json")

    shard_on_cpu()
    sharded = tiny(
        output / "fsdp", *settings(folder, SIZES, "data.batch_size=8", "run.fsdp=true", "run.checkpoint_every_s=0")
    )
    with stopped_before(4):  # in the second epoch
        train(sharded)
    train(sharded, resume=True)


def test_two_processes_are_one_with_twice_the_batch(tmp_path, folder):
    start_many(2, tmp_path / "printed.txt", two_processes, tmp_path, folder)
    printed = (tmp_path / "printed.txt").read_text()
    assert printed.count("epoch 2/2") == 2  # DDP's and FSDP's, of the first process alone
    for name, optimizer in (("ddp", SGD), ("fsdp", ())):
        one = tmp_path / f"one-{name}"
        train(tiny(one, *settings(folder, SIZES, *optimizer, "data.batch_size=16", "ema.decay=0.9")))
        for row, other in zip(rows(tmp_path / name), rows(one), strict=True):
            for key in ("lr", "train_loss", "eval_loss", "top1", "top5", *(("ema_loss",) if name == "ddp" else ())):
                assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-4), (name, key)
            assert row["broken_images"] == other["broken_images"]
        weights = load_file(tmp_path / name / "last" / "model.safetensors")
        other = load_file(one / "last" / "model.safetensors")
        assert weights.keys() == other.keys()
        if name == "ddp":
            for key, value in weights.items():
                torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)

    import json

    found = json.loads((tmp_path / "evaluation.json").read_text())
    alone = evaluate(tmp_path / "ddp", data="folder", root=folder, device="cpu")
    assert found["images"] == alone.images == 10  # 11, one of them broken
    assert found["top1"] == pytest.approx(alone.top1)
    assert found["loss"] == pytest.approx(alone.loss, rel=1e-5)
    assert found["confusion"] == [list(row) for row in alone.confusion]


def test_broken_images_are_counted_and_named(tmp_path, folder, capsys):
    result = train(tiny(tmp_path, *settings(folder, "data.batch_size=36", "optim.lr=1e-3")))
    assert [row["broken_images"] for row in rows(tmp_path)] == ["1", "1"]
    assert [Path(name).name for name in result.broken] == ["03.png"]
    assert "03.png" in capsys.readouterr().err
