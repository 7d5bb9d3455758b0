"""LoRAs of peft on the 1x1 convolutions, and on the projections of GSPN2d that are parameters without a module."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

peft = pytest.importorskip("peft", reason="needs gspn[dev]")
import gspn.models  # noqa: E402, F401

MODULES = ["in_proj", "out_proj", "fc1", "fc2"]
PARAMETERS = ["gspn.lam_proj", "gspn.u_proj", "gspn.skip_proj"]
# What docs/other_libraries.md names.
WAYS = {
    "convolutions": dict(target_modules=[*MODULES, "gspn.proxy"]),
    "projections": dict(target_modules=MODULES, target_parameters=PARAMETERS),
    "whole scans": dict(target_modules=MODULES, modules_to_save=["gspn", "head.fc"]),
}


@pytest.fixture(scope="module")
def plain():
    return timm.create_model("gspn_pico", num_classes=3, dims=(8, 12), depths=(1, 1)).eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_lora_is_trained_merged_and_loaded(way, plain, tmp_path):
    x, labels = torch.randn(2, 3, 20, 28), torch.tensor([0, 1])
    before, weights = plain(x), copy.deepcopy(plain.state_dict())
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, **WAYS[way]))
    assert torch.equal(model(x), before)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    # gspn_pico's blocks have five 1x1 convolutions, three gates, and six parameters in a GSPN2d; fc has two.
    assert len(trained) == 2 * {"convolutions": 2 * 5, "projections": 2 * 7, "whole scans": 2 * 4 + 6 + 1}[way]
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(3):  # a LoRA's first factor has a gradient of zero in the first step
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert all(p.grad.count_nonzero() for p in trained.values())
    with torch.no_grad():
        after = model(x)
        assert not torch.equal(after, before)
        with model.disable_adapter():
            assert torch.equal(model(x), before)

        def close(result):  # merged weights are rounded once more
            return torch.allclose(result, after, rtol=1e-5, atol=1e-6)

        model.merge_adapter()
        assert close(model(x))
        model.unmerge_adapter()
        assert close(model(x))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        assert close(loaded(x))
        merged = loaded.merge_and_unload()
        assert close(merged(x))
        copy.deepcopy(plain).load_state_dict(merged.state_dict())  # the same keys and shapes: a plain model again
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


def test_the_projection_of_taps_has_too_many_axes_for_peft(plain):
    with pytest.raises(ValueError, match="4 dimensional"):
        peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(target_modules=[], target_parameters=["tap_proj"]))
