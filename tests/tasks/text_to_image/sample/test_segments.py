"""Scans beyond the first stage restart after as many lines as the first stage's maps have."""

from __future__ import annotations

import pytest
import torch

from gspn.tasks.text_to_image.conditioning import encode_prompts
from gspn.tasks.text_to_image.sample import UpscalingConfig, sample
from gspn.tasks.text_to_image.sample.progressive_upscaling import map_lengths, segmented_scans
from tasks.text_to_image.t2i_support import make_adapter


def test_lines_are_the_longer_sides(sd):
    text = encode_prompts(sd, ["red"])
    assert map_lengths(sd.unet, text, height=64, width=96, factor=8) == {}
    adapter = make_adapter(sd)
    with adapter.mounted(sd.unet):
        found = map_lengths(sd.unet, text, height=64, width=96, factor=8)
    assert set(found) == set(adapter.mixers)
    for name, lines in found.items():
        assert lines == (6 if name.startswith("mid") else 12)
    assert all(not mixer._forward_pre_hooks for mixer in adapter.mixers.values())


def test_segments_are_set_and_restored(sd):
    plain, segmented = make_adapter(sd), make_adapter(sd, segment={"down": 3, "mid": 2, "up": 3})
    noisy, text = torch.randn(1, 4, 8, 12), encode_prompts(sd, ["red"])

    def run():
        with torch.no_grad():
            return sd.unet(noisy, 10, text.states).sample

    with segmented.mounted(sd.unet):
        wanted = run()
    with plain.mounted(sd.unet):
        before = run()
        lines = {name: 2 if name.startswith("mid") else 3 for name in plain.mixers}

        def fail():
            with segmented_scans(sd.unet, lines):
                assert torch.equal(run(), wanted)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert torch.equal(run(), before)
    assert not torch.allclose(before, wanted)
    with segmented.mounted(sd.unet), segmented_scans(sd.unet, dict.fromkeys(segmented.mixers, 100)):
        assert torch.equal(run(), wanted)  # those that restart sooner by themselves do so


def test_scans_are_segmented_beyond_the_first_stage(sd, tmp_path, monkeypatch):
    from gspn.diffusers import GSPNTokenMixer

    seen = []
    plain = GSPNTokenMixer.forward

    def watched(self, hidden_states, *args, map_size=None, **kwargs):
        if not isinstance(hidden_states, torch._subclasses.FakeTensor):
            seen.append((max(map_size), self.scan.segment))
        return plain(self, hidden_states, *args, map_size=map_size, **kwargs)

    monkeypatch.setattr(GSPNTokenMixer, "forward", watched)
    options = {"adapter": make_adapter(sd), "height": 128, "width": 128, "steps": 4, "device": "cpu", "check": False}
    sample(sd, "red", output=tmp_path / "with", upscale=True, **options)
    # Trained at 8 latent pixels, drawn at 8 and 16; the level below has half of that.
    assert set(seen) == {(8, None), (4, None), (16, 8), (8, 4)}
    seen.clear()
    sample(sd, "red", output=tmp_path / "without", upscale=UpscalingConfig(segment_scans=False), **options)
    assert set(seen) == {(8, None), (4, None), (16, None)}
    first, second = ((tmp_path / one / "00000.png").read_bytes() for one in ("with", "without"))
    assert first != second
