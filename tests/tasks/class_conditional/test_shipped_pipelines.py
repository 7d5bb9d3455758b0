"""The pipelines that come with the package: small, safe to load, documented, and as good as their cards say."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open

from gspn._errors import UsageError
from gspn.data import open_dataset
from gspn.tasks.class_conditional import load_pipeline, sample, shipped_pipelines
from gspn.tasks.classify import predict

SHIPPED = shipped_pipelines()


def test_there_are_some():
    assert "gspn_denoiser.mnist5k" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_are_small_and_of_half_precision_and_have_a_card(name):
    [path] = SHIPPED[name].rglob("*.safetensors")
    assert path.stat().st_size < 12_000_000
    with safe_open(path, framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118  # no mapping
    card = (SHIPPED[name] / "README.md").read_text()
    assert "gspn class-conditional train --config" in card and "seed" in card and "torch 2." in card
    # Nothing of the machine that made them.
    texts = [path.read_text() for path in SHIPPED[name].rglob("*.json")]
    assert not any(value.startswith("/") for text in texts for value in _strings(json.loads(text)))


def _strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in _strings(one)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("name", SHIPPED)
def test_classes_are_those_of_the_data(name):
    pipeline = load_pipeline(name)
    assert list(pipeline.labels) == list(open_dataset(name.partition(".")[2], "val").classes)
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}


def test_it_samples_the_classes(tmp_path):
    found = sample("gspn_denoiser.mnist5k", output=tmp_path, number=40, steps=10, guidance=2.0)
    guesses = predict([tmp_path / f"{i:05d}.png" for i in range(40)], "gspn_pico.mnist5k")
    right = [guess.indices[0] == record.label for guess, record in zip(guesses, found.records, strict=True)]
    # Ten steps are few; one in ten would be right by chance.
    assert sum(right) >= 34
    said = re.search(
        r"\| guidance 2 \|.*\| ([\d.]+) % \|", (SHIPPED["gspn_denoiser.mnist5k"] / "README.md").read_text()
    )
    assert said is not None and abs(100 * sum(right) / len(right) - float(said.group(1))) < 15


def test_a_name_that_is_nearly_right():
    with pytest.raises(UsageError, match=r"did you mean 'gspn_denoiser\.mnist5k'"):
        load_pipeline("gspn_denoiser.mnist")
