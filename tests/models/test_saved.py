"""Folders with a model that is damaged, wrong, or another's."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch

pytest.importorskip("timm", reason="needs gspn[train]")
safetensors = pytest.importorskip("safetensors.torch", reason="needs gspn[train]")

import timm  # noqa: E402
from PIL import Image  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from gspn._errors import UsageError  # noqa: E402
from gspn.cli import app  # noqa: E402
from gspn.models.saved import load_saved  # noqa: E402

NAME, CLASSES = "gspn_pico", 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model = timm.create_model(NAME, num_classes=CLASSES)
    config = {
        "architecture": NAME, "num_classes": CLASSES, "num_features": model.num_features,
        "label_names": ["a", "b", "c"], "model_args": {},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
                           "interpolation": "bicubic", "num_classes": CLASSES},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def config_with(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def cfg_with(**changes):
    def damage(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["pretrained_cfg"] |= changes
        path.write_text(json.dumps(config))

    return damage


def text(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


def weights(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.load_file(path)
        change(tensors)
        safetensors.save_file(tensors, path)

    return damage


def raw(change):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def first(tensors, change):
    key = next(key for key, value in tensors.items() if value.ndim == 4)
    tensors[key] = change(tensors[key])


DAMAGES = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "empty config": text(b""),
    "truncated config": text(b'{"architecture": "gspn'),
    "latin-1 config": text('{"architecture": "é"}'.encode("latin-1")),
    "deep config": text(b"[" * 100_000),
    "long number": text(b'{"num_classes": ' + b"9" * 6000 + b"}"),
    "list": text(b"[]"),
    "null": text(b"null"),
    "number": text(b"3"),
    "no architecture": text(b"{}"),
    "unknown architecture": config_with(architecture="gspn_picoo"),
    "architecture is a list": config_with(architecture=["gspn_pico"]),
    "architecture is a path": config_with(architecture="local-dir:/tmp"),
    "negative classes": config_with(num_classes=-1),
    "too many classes": config_with(num_classes=10**12),
    "classes in words": config_with(num_classes="three"),
    "other classes": config_with(num_classes=4, label_names=["a", "b", "c", "d"]),
    "classes twice": config_with(model_args={"num_classes": 5}),
    "fewer names": config_with(label_names=["a"]),
    "names are a number": config_with(label_names=3),
    "arguments are a list": config_with(model_args=[1]),
    "unknown argument": config_with(model_args={"colour": "red"}),
    "wrong argument": config_with(model_args={"in_chans": -3}),
    "argument of another type": config_with(model_args={"drop_rate": "high"}),
    "weights left random": config_with(model_args={"pretrained_strict": False}),
    "no weights in memory": config_with(model_args={"device": "meta"}),
    "features alone": config_with(model_args={"features_only": True}),
    "endless layers": config_with(model_args={"depths": [1, 1, 10**9]}),
    "many layers": config_with(model_args={"depths": [1, 1, 10**5]}),
    "absurd width": config_with(model_args={"dims": [10**9, 10**9 + 2, 128]}),
    "more width than weights": config_with(model_args={"dims": [30000, 30002, 128]}),
    "cfg is a list": config_with(pretrained_cfg=[]),
    "unknown cfg": cfg_with(colour="red"),
    "short mean": cfg_with(mean=[0.5]),
    "mean in words": cfg_with(mean=["a", "b", "c"]),
    "std 0": cfg_with(std=[0.5, 0, 0.5]),
    "std nan": text(b'{"architecture": "gspn_pico", "pretrained_cfg": {"std": [NaN, 1, 1]}}'),
    "input size 0": cfg_with(input_size=[3, 0, 32]),
    "input size of two": cfg_with(input_size=[3, 32]),
    "input size": cfg_with(input_size=[3, 10**9, 10**9]),
    "crop 0": cfg_with(crop_pct=0),
    "interpolation": cfg_with(interpolation="foo"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights are a pipe": pipe("model.safetensors"),
    "config is a pipe": pipe("config.json"),
    "weights are a folder": folder("model.safetensors"),
    "only a pickle": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "empty weights": raw(lambda data: b""),
    "truncated weights": raw(lambda data: data[: len(data) // 2]),
    "header that lies": raw(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
    "header of zeros": raw(lambda data: bytes(len(data))),
    "other shapes": weights(lambda tensors: first(tensors, lambda value: value[:1].clone())),
    "integers": weights(lambda tensors: first(tensors, lambda value: value.to(torch.int32))),
    "not finite": weights(lambda tensors: first(tensors, lambda value: value * float("nan"))),
    "missing": weights(lambda tensors: tensors.pop(next(iter(tensors)))),
    "more": weights(lambda tensors: tensors.update(more=torch.zeros(1))),
}


@pytest.fixture(params=DAMAGES)
def damaged(request, whole, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    DAMAGES[request.param](folder)
    return folder


def test_a_whole_one_loads(whole):
    assert load_saved(whole).num_classes == CLASSES


def test_it_is_refused_in_one_line(damaged):
    with pytest.raises((UsageError, OSError)) as error:  # the command line makes one line of either
        load_saved(damaged)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["std 0", "truncated weights", "not finite", "negative classes", "list", "no config"])
def test_commands_say_it_in_one_line(whole, tmp_path, name):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    DAMAGES[name](tmp_path)
    Image.new("RGB", (32, 32)).save(image := tmp_path / "image.png")
    for arguments in (
        ["classify", "predict", image, "--model", tmp_path],
        ["classify", "evaluate", tmp_path, "--data", "digits"],
        ["explain", image, "--model", tmp_path, "--size", "32"],
    ):
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert result.stderr.startswith("error: "), result.output
