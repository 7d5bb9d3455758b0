"""The weights that come in the package: small, safe to load, documented, and as good as their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import gspn.models
from gspn.data import open_dataset
from gspn.tasks.classify import evaluate

WEIGHTS = Path(gspn.models.__file__).parent / "weights"
NAMES = sorted(path.name.removesuffix(".safetensors") for path in WEIGHTS.glob("*.safetensors"))


def data_of(name: str) -> str:
    return name.partition(".")[2]


def test_every_file_is_registered_and_every_registered_file_is_here() -> None:
    assert sorted(timm.list_pretrained("gspn*")) == NAMES
    assert "gspn_pico.mnist5k" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_file_is_small_half_precision_and_has_a_card(name: str) -> None:
    path = WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size < 8_000_000
    with safe_open(path, framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118  # no mapping
    card = (WEIGHTS / f"{name}.md").read_text()
    assert "gspn classify train --config" in card
    assert "Seed 0" in card
    assert "torch 2." in card


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_those_of_the_data(name: str) -> None:
    model = timm.create_model(name, pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == list(open_dataset(data_of(name), "val").classes)
    assert model.num_classes == len(model.pretrained_cfg["label_names"])


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_what_the_card_says(name: str) -> None:
    said = re.search(r"\*\*([\d.]+) %\*\*", (WEIGHTS / f"{name}.md").read_text())
    assert said is not None
    result = evaluate(name, data=data_of(name))
    # Another machine's rounding may move an image or two across a decision.
    assert abs(result.top1 - float(said.group(1))) <= 0.6


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, pretrained=True).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert "/weights/" not in (tmp_path / "config.json").read_text(), "a path of this machine travels with the model"
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name.partition(".")[0]
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_pretrained_adapts_to_other_classes_and_channels() -> None:
    model = timm.create_model("gspn_pico", pretrained=True, num_classes=3, in_chans=1).eval()
    whole = timm.create_model("gspn_pico", pretrained=True).eval()
    # timm sums the colours in the weights' own precision.
    grey = whole.stem.conv1.weight.sum(1, keepdim=True).half().float()
    assert torch.equal(model.stem.conv1.weight, grey)
    with torch.no_grad():
        assert model(torch.rand(1, 1, 28, 28)).shape == (1, 3)
