"""Encoded captions: what the encoders say, kept in files, found again."""

from __future__ import annotations

import pytest
import torch

from gspn.tasks.core.errors import UsageError
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


def test_captions_are_drawn_from_each_images_own(sd, tmp_path):
    table = cache_text(sd, CAPTIONS, tmp_path / "text")
    torch.manual_seed(0)
    images = torch.arange(3).repeat(2000)
    rows = table.drawn(images, dropout=0.25)
    own = {0: {1, 2}, 1: {3}, 2: {4, 5, 6}}
    for image, wanted in own.items():
        drawn = rows[images == image]
        assert set(drawn.tolist()) == wanted | {0}
        assert abs((drawn == 0).float().mean() - 0.25) < 0.04
        for row in wanted:
            assert abs((drawn == row).float().mean() - 0.75 / len(wanted)) < 0.04


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
    with pytest.raises(UsageError, match="of other captions"):
        cache_text(sd, [*CAPTIONS[:2], ("grey", "a green one", "lime")], directory, shard_size=3)
    with torch.no_grad():
        sd.text_encoder.get_input_embeddings().weight[0, 0] += 1
    try:
        with pytest.raises(UsageError, match="of other encoders"):
            cache_text(sd, CAPTIONS, directory, shard_size=3)
    finally:
        with torch.no_grad():
            sd.text_encoder.get_input_embeddings().weight[0, 0] -= 1


def test_what_a_unet_is_told(sd, sdxl):
    text = encode_prompts(sdxl, ["red", "blue"])
    given = unet_arguments(sdxl.unet, text, 24, 40)
    assert given["added_cond_kwargs"]["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]] * 2
    with pytest.raises(UsageError, match="pooled"):
        unet_arguments(sdxl.unet, Conditioning(text.states), 24, 40)
    assert list(unet_arguments(sd.unet, text, 24, 40)) == ["encoder_hidden_states"]
    with pytest.raises(UsageError, match="no prompt"):
        encode_prompts(sd, [])


def test_killed_before_the_last_word_on_it(sd, tmp_path, monkeypatch):
    """All shards are there, and the index does not list them."""
    from gspn.tasks.text_to_image import text_cache as text

    plain, written = text.write_text, []

    class Killed(Exception):  # noqa: N818
        pass

    def write_text(path, content):
        written.append(path.name)
        if written.count("index.json") == 2:
            raise Killed
        plain(path, content)

    monkeypatch.setattr(text, "write_text", write_text)
    with pytest.raises(Killed):
        cache_text(sd, CAPTIONS, tmp_path / "text", shard_size=3)
    monkeypatch.undo()
    table = cache_text(sd, CAPTIONS, tmp_path / "text", shard_size=3)
    assert torch.equal(table.read(torch.tensor([6])).states, rounded(encode_prompts(sd, ["lime"])))
    assert sorted(path.suffix for path in (tmp_path / "text").iterdir()) == [".json", *[".safetensors"] * 3]


def test_what_else_decides_what_encoders_say_is_noticed(sdxl, tmp_path):
    cache_text(sdxl, CAPTIONS, tmp_path / "text")
    sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        with pytest.raises(UsageError, match="of other encoders"):
            cache_text(sdxl, CAPTIONS, tmp_path / "text")
    finally:
        sdxl.register_to_config(force_zeros_for_empty_prompt=True)
