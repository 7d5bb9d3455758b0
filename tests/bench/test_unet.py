"""The UNet of a text-to-image model with self-attention, with GSPN and with no token mixer, at 1/20 of its width."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers.models", reason="needs gspn[diffusers]")

from gspn.bench import unet
from gspn.bench.attention import SELF_ATTENTION
from gspn.bench.unet import GSPN, LOCAL, NO_MIXER, SHARED, UNetSweep
from gspn.diffusers import GSPNTokenMixer


@pytest.fixture(scope="module")
def sweep() -> UNetSweep:
    return UNetSweep(width=20)


def mixers(sweep: UNetSweep, name: str) -> list[GSPNTokenMixer]:
    return [module for module in sweep.unet(name).modules() if isinstance(module, GSPNTokenMixer)]


def test_candidates_are_what_they_are_called(sweep):
    attentions = {name: list(unet.self_attention_blocks(sweep.unet(name)).values()) for name in UNetSweep.candidates}
    assert {len(blocks) for blocks in attentions.values()} == {16}
    assert [len(mixers(sweep, name)) for name in UNetSweep.candidates] == [0, 16, 16, 16, 0]
    assert {mixer.scan.groups == mixer.dim for mixer in mixers(sweep, GSPN)} == {True}
    assert {mixer.scan.groups for mixer in mixers(sweep, SHARED)} == {1}
    assert {mixer.scan.segment for mixer in mixers(sweep, LOCAL)} == {8}
    assert {type(block.attn1) for block in attentions[NO_MIXER]} == {unet.PassThrough}
    # All share the weights of what they have in common, and differ in what comes out.
    whole = sweep.unet(SELF_ATTENTION).conv_in.weight
    assert all(sweep.unet(name).conv_in.weight is whole for name in UNetSweep.candidates)
    results = [sweep.call(name, 64)() for name in UNetSweep.candidates]
    assert {tuple(one.shape) for one in results} == {(1, 4, 8, 8)}
    assert all(not torch.allclose(one, results[0]) for one in results[1:])


def test_architectures_have_the_published_counts():
    for name, millions in (("sd15", 860), ("sdxl", 2567)):
        with torch.device("meta"):
            made = unet.UNet2DConditionModel(**UNetSweep(arch=name).config())
        assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)


def test_mixers_are_compared_with_the_specification(sweep, monkeypatch):
    accuracies = sweep.check()
    assert list(accuracies) == [GSPN, SHARED, LOCAL]
    assert all(one.ok for checked in accuracies.values() for one in checked)
    plain = GSPNTokenMixer.forward

    def wrong(self, hidden_states, **options):
        result = plain(self, hidden_states, **options)
        return result if self.scan.impl == "reference" else result + 1e-3

    monkeypatch.setattr(GSPNTokenMixer, "forward", wrong)
    assert not any(one.ok for checked in sweep.check().values() for one in checked)


def test_times_and_ratios_to_the_lower_bound(sweep):
    results = sweep.measure([64, 128], slowest_ms=1e6, repeats=1, min_time=0)
    assert [(r.name, r.height) for r in results] == [
        (name, size) for size in (64, 128) for name in UNetSweep.candidates
    ]
    ratios = unet.over_lower_bound(results)
    assert ratios[NO_MIXER, 64] == 1 and len(ratios) == 10
    params = {r.name: r.details["params"] for r in results}
    assert params[NO_MIXER] < min(params[name] for name in (SELF_ATTENTION, GSPN, SHARED, LOCAL))
    assert {r.mode for r in results} == {"sd15, width 1/20"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "sd3"}, "not one of sd15, sdxl"),
        ({"width": 7}, "does not divide the channels"),
        ({"width": 320}, "does not divide the channels"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        UNetSweep(**options).config()
