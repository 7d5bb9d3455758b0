"""Training: it learns, it writes what timm loads, and it is what the configuration says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from safetensors import safe_open

from gspn._errors import UsageError
from gspn.tasks.classify import TrainConfig, train
from gspn.tasks.classify.training import Classification
from gspn.tasks.core.devices import make_accelerator
from gspn.tasks.core.progress import Reporter
from gspn.tasks.core.task import Context
from tasks.classify.runs import RANDOM, tiny
from tasks.runs import assert_same, newest_state, rows, stopped_before


def test_it_learns(finished):
    result, said = finished
    assert result.best_score > 75
    table = rows(result.output, timeless=False)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert [row["step"] for row in table] == ["22", "44", "66"]
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert max(max(float(row["top1"]), float(row["ema_top1"])) for row in table) == pytest.approx(result.best_score)
    assert result.last is not None and result.last.images_per_second > 0 and result.last.peak_memory_mib > 0
    # One line an epoch where there is no terminal.
    assert len([line for line in said.splitlines() if line.startswith("epoch ")]) == 3
    assert list(result.output.glob("tensorboard/events*"))


def test_timm_loads_what_it_writes(finished):
    result, _ = finished
    model = timm.create_model(f"local-dir:{result.output / 'best'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with safe_open(result.output / "best" / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["gspn"])
    assert header["epoch"] == result.best_epoch
    assert header["weights"] in ("raw", "ema")
    assert header["top1"] == pytest.approx(result.best_score)


def test_the_saved_configuration_is_the_resolved_one_and_can_be_read_again(finished):
    result, _ = finished
    text = (result.output / "config.yaml").read_text()
    assert "images_per_update: 64" in text
    again = TrainConfig.load(result.output / "config.yaml")
    assert again.schedule.epochs == 3
    assert again.run.output == result.output


def test_rates_follow_the_images_of_an_update(tmp_path):
    config = tiny(tmp_path, "schedule.epochs=1", "optim.lr_base_batch=512", "schedule.min_lr=1e-4",
                  "data.batch_size=32", "optim.accumulate=4")  # fmt: skip
    train(config)
    text = (tmp_path / "config.yaml").read_text()
    assert "images_per_update: 128" in text
    assert "  lr: 0.001\n" in text  # 4e-3 * 128 / 512
    assert "  min_lr: 2.5e-05\n" in text


def test_the_same_seed_gives_the_same_weights_whatever_the_number_of_workers(tmp_path):
    settings = ["schedule.epochs=1", *RANDOM]
    train(tiny(tmp_path / "a", *settings))
    train(tiny(tmp_path / "b", *settings, "data.workers=2"))
    assert_same(newest_state(tmp_path / "a"), newest_state(tmp_path / "b"))


def test_accumulated_batches_are_one_batch(tmp_path):
    train(tiny(tmp_path / "whole", "schedule.epochs=1"))
    train(tiny(tmp_path / "parts", "schedule.epochs=1", "data.batch_size=16", "optim.accumulate=4"))
    for row, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-4)
        assert float(row["eval_loss"]) == pytest.approx(float(other["eval_loss"]), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ["model.name=test_vit", "model.kwargs.depth=2", "model.channels_last=true"],
        ["optim.layer_decay=0.7", "model.grad_checkpointing=true", "run.precision=bf16"],
        ["augment.enabled=false", "augment.mixup=1", "optim.name=lamb", "optim.betas=[0.9, 0.95]"],
        ["augment.auto_augment=rand-m5-n1", "augment.crop=resized", "schedule.name=poly", "run.eval_every=2",
         "schedule.cooldown_epochs=1", "schedule.warmup_epochs=0", "schedule.epochs=2"],
    ],
    ids=["channels_last", "layer_decay", "no_augmentation", "poly"],
)  # fmt: skip
def test_options_run(tmp_path, settings):
    result = train(tiny(tmp_path, "data.batch_size=256", "schedule.epochs=1", *settings))
    assert result.last is not None and result.last.train_loss < 2.5


def test_networks_of_gspn_train(tmp_path):
    pytest.importorskip("gspn.models")
    result = train(tiny(tmp_path, "schedule.epochs=1", "data.batch_size=256", "model.name=gspn_pico", "data.size=16",
                        "model.drop_path=0.1"))  # fmt: skip
    assert result.last is not None and result.last.train_loss < 2.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=tset_convnext", "did you mean 'test_convnext'"),
        ("data.name=digit", "digits"),
        ("data.batch_size=4096", "lower data.batch_size"),
        ("data.train_split=trian", "split"),
        ("model.kwargs.no_such=1", "no_such"),
        ("model.kwargs.num_classes=3", "multiple values for keyword argument 'num_classes'"),
        ("model.kwargs.in_chans=5", "images of 32 x 32 pixels: .* to have 5 channels"),
        ("model.name=test_vit.nope", r"Invalid pretrained tag \(nope\)"),
        ("data.options.root=x", "multiple values for keyword argument 'root'"),
        ("optim.name=adamwww", "adamwww"),
        ("schedule.name=plateau", "plateau"),
        ("schedule.name=cosin", "cosin"),
        ("run.fsdp=true", "torchrun"),
    ],
)
def test_errors_name_the_value_and_the_remedy(tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(tmp_path / "out", "schedule.epochs=1", override))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_stopped_and_resumed_is_the_same_run(tmp_path):
    settings = [*RANDOM, "optim.accumulate=2", "run.checkpoint_every_s=0", "data.sizes=[32, 48]"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(tiny(whole, *settings))
    with stopped_before(14):
        train(tiny(stopped, *settings))
    train(tiny(stopped, *settings), resume=True)
    assert_same(newest_state(stopped), newest_state(whole))
    assert rows(stopped) == rows(whole)
    for name in ("best", "last"):
        path = Path(name, "model.safetensors")
        assert (stopped / path).read_bytes() == (whole / path).read_bytes()


def test_several_sizes(tmp_path):
    config = tiny(tmp_path, "data.batch_size=62", "data.sizes=[32, 48]", "augment.mixup=0.4")
    context = Context(config, make_accelerator(device="cpu"), Reporter(Console(quiet=True), 1, quiet=True))
    setup = Classification(config).setup(context)
    # Mixing takes pairs: 26 of the 27 images that have no more pixels.
    assert {tuple(images.shape) for images, _ in setup.train.batches(0)} == {(62, 3, 32, 32), (26, 3, 48, 48)}
    assert {tuple(images.shape[1:]) for images, _ in setup.evaluation} == {(3, 32, 32)}
    vit = ["model.name=test_vit", "data.sizes=[32, 64]"]
    with pytest.raises(UsageError, match=r"images of 64 x 64 pixels: .*leave 64 out of data\.sizes.*dynamic_img_size"):
        Classification(tiny(tmp_path, *vit, "model.kwargs.dynamic_img_size=false")).setup(context)
    Classification(tiny(tmp_path, *vit)).setup(context)


def test_presets_are_complete_and_name_registered_models():
    pytest.importorskip("gspn.models")
    names = TrainConfig.preset_names()
    assert {"imagenet_tiny", "imagenet_small", "imagenet_base", "mnist5k_pico", "emoji_nano", "digits_pico"} <= set(
        names
    )
    for name in names:
        config = TrainConfig.load(name)
        assert timm.is_model(config.model.name)
        assert config.run.output.name == name
    base = TrainConfig.load("imagenet_base")
    assert isinstance(base, TrainConfig)
    assert (base.optim.lr, base.schedule.min_lr, base.model.drop_path) == (5e-4, 5e-6, 0.5)
