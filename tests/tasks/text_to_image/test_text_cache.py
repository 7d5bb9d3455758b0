"""Encoded captions: what the encoders say, kept in files, found again."""

from __future__ import annotations

import json

import pytest
import torch

from gspn._errors import UsageError
from gspn.tasks.text_to_image.conditioning import Conditioning, encode_nothing, encode_prompts, unet_arguments
from gspn.tasks.text_to_image.text_cache import cache_text

CAPTIONS = [("red", "a red square"), ("blue",), ("green", "a green one", "lime")]


def rounded(text: Conditioning) -> torch.Tensor:
    return text.states.half().float()


def test_rows_are_what_the_encoders_say(sd, tmp_path):
    table = cache_text(sd, CAPTIONS, tmp_path / "text", shard_size=3)
    assert [shard.rows for shard in table.index.shards] == [3, 3, 1]
    flat = ["", *(caption for some in CAPTIONS for caption in some)]
    found = table.read(torch.arange(7))
    assert torch.equal(found.states, rounded(encode_prompts(sd, flat)))
    assert found.pooled is None
    assert torch.equal(table.read(torch.tensor([6, 1])).states, rounded(encode_prompts(sd, ["lime", "red"])))
    assert table.leading(torch.tensor([0, 1, 2])).tolist() == [1, 3, 4]


def test_two_encoders_and_zeros_for_nothing(sdxl, tmp_path):
    table = cache_text(sdxl, CAPTIONS, tmp_path / "text")
    states, _, pooled, _ = sdxl.encode_prompt("blue", do_classifier_free_guidance=False)
    found = table.read(torch.tensor([3]))
    assert torch.equal(found.states, states.half().float()) and torch.equal(found.pooled, pooled.half().float())
    assert sdxl.config.force_zeros_for_empty_prompt
    nothing = table.read(torch.tensor([0]))
    assert not nothing.states.any() and not nothing.pooled.any()
    sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        assert encode_nothing(sdxl).states.any()
    finally:
        sdxl.register_to_config(force_zeros_for_empty_prompt=True)


def test_captions_are_sampled_from_each_images_own(sd, tmp_path):
    table = cache_text(sd, CAPTIONS, tmp_path / "text")
    torch.manual_seed(0)
    images = torch.arange(3).repeat(2000)
    rows = table.sample_rows(images, dropout=0.25)
    own = {0: {1, 2}, 1: {3}, 2: {4, 5, 6}}
    for image, expected in own.items():
        sampled = rows[images == image]
        assert set(sampled.tolist()) == expected | {0}
        assert abs((sampled == 0).float().mean() - 0.25) < 0.04
        for row in expected:
            assert abs((sampled == row).float().mean() - 0.75 / len(expected)) < 0.04


def test_damaged_files_are_made_again_and_others_refused(sd, tmp_path, monkeypatch):
    directory = tmp_path / "text"
    cache_text(sd, CAPTIONS, directory, shard_size=3)
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    damaged = directory / "text-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (directory / "text-00002.safetensors").unlink()
    asked = []
    from gspn.tasks.text_to_image import text_cache as text

    plain = text.encode_prompts
    monkeypatch.setattr(text, "encode_prompts", lambda p, t: asked.extend(t) or plain(p, t))
    cache_text(sd, CAPTIONS, directory, shard_size=3)
    assert asked == ["blue", "green", "a green one", "lime"]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == whole
    cache_text(sd, CAPTIONS, directory, shard_size=3)
    assert len(asked) == 4
    with pytest.raises(UsageError, match="captions is"):
        cache_text(sd, [*CAPTIONS[:2], ("grey", "a green one", "lime")], directory, shard_size=3)
    with torch.no_grad():
        sd.text_encoder.get_input_embeddings().weight[0, 0] += 1
    try:
        with pytest.raises(UsageError, match="encoders is"):
            cache_text(sd, CAPTIONS, directory, shard_size=3)
    finally:
        with torch.no_grad():
            sd.text_encoder.get_input_embeddings().weight[0, 0] -= 1


def test_what_a_unet_is_told(sd, sdxl):
    text = encode_prompts(sdxl, ["red", "blue"])
    arguments = unet_arguments(sdxl.unet, text, 24, 40)
    assert arguments["added_cond_kwargs"]["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]] * 2
    with pytest.raises(UsageError, match="pooled"):
        unet_arguments(sdxl.unet, Conditioning(text.states), 24, 40)
    assert list(unet_arguments(sd.unet, text, 24, 40)) == ["encoder_hidden_states"]
    with pytest.raises(UsageError, match="no prompt"):
        encode_prompts(sd, [])


def test_those_of_version_0_1_are_found_again(sd, tmp_path):
    directory = tmp_path / "text"
    states = cache_text(sd, CAPTIONS, directory, shard_size=3).read(torch.arange(7)).states
    index = directory / "index.json"
    values = json.loads(index.read_text())
    values["format"] = 1
    values["shards"] = [{key: shard[key] for key in ("file", "rows", "sha256")} for shard in values["shards"]]
    index.write_text(json.dumps(values, indent=1) + "\n")
    before = index.read_bytes()
    assert torch.equal(cache_text(sd, CAPTIONS, directory, shard_size=3).read(torch.arange(7)).states, states)
    assert index.read_bytes() == before


def test_states_that_are_not_finite_are_refused(sd, tmp_path, monkeypatch):
    from gspn.tasks.text_to_image import text_cache

    plain = text_cache.encode_prompts

    def broken(pipeline, texts):
        found = plain(pipeline, texts)
        found.states[texts.index("lime")] = float("inf")
        return found

    monkeypatch.setattr(text_cache, "encode_prompts", broken)
    with pytest.raises(UsageError, match="'lime' has states that are not finite"):
        cache_text(sd, CAPTIONS, tmp_path / "text")


def test_what_else_decides_what_encoders_say_is_noticed(sdxl, tmp_path):
    cache_text(sdxl, CAPTIONS, tmp_path / "text")
    sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        with pytest.raises(UsageError, match="encoders is"):
            cache_text(sdxl, CAPTIONS, tmp_path / "text")
    finally:
        sdxl.register_to_config(force_zeros_for_empty_prompt=True)
