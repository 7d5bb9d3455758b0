"""Every field of every configuration and preset, with values that no run could use."""

from __future__ import annotations

import dataclasses

import pytest

from gspn._errors import UsageError
from gspn.tasks.autoencode import AutoencodeConfig
from gspn.tasks.class_conditional import ClassConditionalConfig
from gspn.tasks.classify import TrainConfig
from gspn.tasks.classify.config import AffineConfig
from gspn.tasks.core.config import read_yaml, settings
from gspn.tasks.text_to_image.distill import DistillConfig
from gspn.tasks.text_to_image.train import TextToImageConfig

CONFIGS = [TrainConfig, ClassConditionalConfig, AutoencodeConfig, TextToImageConfig, DistillConfig]
NASTY = [
    "", None, float("nan"), float("inf"), -float("inf"), -1, 0, 10**400, -(10**400), 2**63, True, [], {}, [1, 2, 3],
    {"a": 1}, "\0", "\ud800", "²", "x" * 10_000, [float("nan")] * 3, [0, 0, 0], [2, 1], [-1, 1], b"bytes",
]  # fmt: skip


def configurations():
    for kind in CONFIGS:
        yield pytest.param(kind(), NASTY, id=kind.__name__)
        for i, name in enumerate(kind.preset_names()):  # a part of the values each: all take minutes
            yield pytest.param(kind.load(name), NASTY[i % 6 :: 6], id=f"{kind.__name__}-{name}")
    affine = AffineConfig(translate=(0.1, 0.1), scale=(0.9, 1.1))
    yield pytest.param(dataclasses.replace(TrainConfig(), augment=dataclasses.replace(
        TrainConfig().augment, affine=affine)), NASTY[::2], id="affine")  # fmt: skip


def numbers(value):
    if isinstance(value, dict | list | tuple):
        return [n for one in (value.values() if isinstance(value, dict) else value) for n in numbers(one)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(("config", "values"), list(configurations()))
def test_every_field_is_accepted_or_named(config, values):
    for key, field, _ in settings(config):
        for value in values:
            try:
                changed = config.changed(**{key: value})
            except UsageError as error:
                message = str(error)
                assert "\n" not in message and len(message) < 1000
                # Two keys may exclude each other; the message then names one of them.
                assert key in message or any(one in message for one, _, _ in settings(config)), (key, value, message)
                continue
            if "dict[str, Any]" not in str(field.type):
                got = {k: v for k, _, v in settings(changed)}.get(key)
                assert all(abs(n) < 2**63 for n in numbers(got)), (key, value)  # no NaN, no infinity
                assert value is not True or got is True


def test_every_number_has_a_range():
    for kind in CONFIGS:
        for key, field, _ in settings(kind()):
            if any(word in str(field.type) for word in ("int", "float")):
                assert "range" in field.metadata, key


@pytest.mark.parametrize(
    "override",
    [
        "data.interpolation=foo", "augment.interpolation=foo", "augment.auto_augment=foo",
        "augment.auto_augment=rand-q3",
        "augment.auto_augment=rand-mX", "augment.auto_augment=''", "augment.auto_augment=augmix-z1", "data.std=[0,0,0]",
        "data.mean=[.nan,0,0]", "augment.scale=[2,1]", "augment.scale=[0.5,0.2]", "augment.scale=[0,1]",
        "augment.ratio=[2,1]", "augment.affine.fill=256", "optim.betas=[0.9,1]", "optim.momentum=1", "optim.eps=-1",
        "optim.clip_grad=0", "schedule.warmup_lr=-1", "ema.warmup_power=0", "augment.re_count=0", "data.crop_pct=0",
        "data.root=''", 'data.root="a\\0"', "data.size=1e9", "run.seed=1e30", "run.seed=18446744073709551616",
        "data.workers=1000000", ".".join(["a"] * 5000) + "=1", "data.name=2026-99-99", "data.name=!!bool x",
        "data.name=!!timestamp x", "data.name=!!python/name:os.system", "data.size=" + "9" * 6000,
    ],
)  # fmt: skip
def test_refused_in_one_line(override):
    with pytest.raises(UsageError) as error:
        TrainConfig().changed(override)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def bomb() -> bytes:
    return "\n".join(["a0: &a0 [1,1,1,1,1,1,1,1,1,1]", *(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]).encode()  # fmt: skip


FILES = {
    "latin-1": "run: {output: café}".encode("latin-1"),
    "utf-16": "run: {output: x}".encode("utf-16"),
    "nested": b"[" * 5000,
    "nested mappings": b"{a: " * 5000,
    "aliases": bomb(),
    "chain of aliases": "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 5000))]).encode(),
    "itself": b"run: &a {output: *a}",
    "itself in options": b"data: {options: &a {b: *a}}",
    "twice": b"run: {seed: 1, seed: 2}",
    "section twice": b"run: {seed: 1}\nrun: {seed: 2}",
    "NUL": b"run: {output: x\0}",
    "control": b"run: {output: \x1b}",
    "scalar": b"3",
    "false": b"false",
    "list": b"[1, 2]",
    "large": b"#" * (1 << 21),
    "tag": b"!!python/object/apply:os.system ['true']",
    "unhashable": b"{[1]: 2}",
    "number as a key": b"{1: 2}",
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_refused_in_one_line(tmp_path, name):
    file = tmp_path / "mine.yaml"
    file.write_bytes(FILES[name])
    with pytest.raises(UsageError, match=r"mine\.yaml") as error:
        TrainConfig.load(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_merged_keys_are_no_duplicates(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: &a {lr: 1.0, eps: 1.0e-8}\nema: {decay: null}\n")
    assert TrainConfig.load(file).optim.lr == 1
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}", "it") == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_directory_and_a_pipe_are_no_configuration(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    for source in (tmp_path, tmp_path / "pipe.yaml"):
        with pytest.raises(UsageError, match="cannot be read"):
            TrainConfig.load(source)
