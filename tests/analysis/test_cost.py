"""Counts of parameters and multiply-adds: the closed form, the published figures, another counter."""

from __future__ import annotations

import pytest
import timm
import torch

import gspn.models  # noqa: F401
from gspn.analysis import count_cost, gspn2d_macs
from gspn.analysis.scans import find_scans, visit_scans
from gspn.nn import GSPN2d

# Millions of parameters, billions of multiply-adds at 224 x 224. Those of GSPN are counted from the authors' official
# configurations; their paper (arXiv 2501.12381) says 30 / 5.3, 50 / 9.0 and 89 / 15.9, and the small one differs most.
GSPN = {"gspn_tiny": (31.5, 5.3), "gspn_small": (50.8, 12.0), "gspn_base": (93.1, 15.9)}
# Of GSPN-2 (arXiv 2512.07884) the paper's own: widths and depths are not published, and ours do no more than this.
GSPN2 = {"gspn2_tiny": (24, 4.2), "gspn2_small": (50, 9.2), "gspn2_base": (89, 14.2)}
SMALL = {"gspn_pico": 1.0, "gspn_nano": 4.0}


def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", GSPN)
def test_the_sizes_of_gspn_are_those_of_the_official_configurations(name):
    cost = count_cost(on_meta(name))
    params, macs = GSPN[name]
    assert cost.params / 1e6 == pytest.approx(params, rel=0.05)
    assert cost.macs / 1e9 == pytest.approx(macs, rel=0.05)


@pytest.mark.parametrize("name", GSPN2)
def test_the_sizes_of_gspn2_are_the_papers(name):
    cost = count_cost(on_meta(name))
    params, macs = GSPN2[name]
    assert cost.params / 1e6 == pytest.approx(params, rel=0.05)
    assert cost.macs / 1e9 <= macs


@pytest.mark.parametrize("name", SMALL)
def test_the_small_models(name):
    assert count_cost(on_meta(name)).params / 1e6 == pytest.approx(SMALL[name], rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 1, "proxy_dim": 2},
        {"groups": 4, "segment": 2, "skip": False},
        {"directions": ("left", "up")},
        {"alignment": "official"},
    ],
)
def test_the_closed_form_is_the_count(options):
    module = GSPN2d(12, **options)
    height, width = (9, 9) if "alignment" in options else (7, 10)
    assert count_cost(module, (12, height, width)).macs == gspn2d_macs(module, height, width)


def test_the_closed_form_is_the_count_inside_a_model():
    model = timm.create_model("gspn_pico")
    cost = count_cost(model, (3, 37, 50))
    sizes = {}
    visit_scans(model, torch.zeros(1, 3, 37, 50), lambda name, module, x: sizes.update({name: x.shape[-2:]}))
    for name, module in find_scans(model).items():
        assert cost.by_module[name] == gspn2d_macs(module, *sizes[name])
    parts = ("stem", *(f"stages.{i}" for i in range(3)), "head")
    assert sum(cost.by_module[part] for part in parts) == cost.macs


def test_the_model_stays_as_it_is():
    model = timm.create_model("gspn_pico").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_cost(model)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_others_of_timm_are_counted():
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224")
    cost = count_cost(vit)
    assert cost.params / 1e6 == pytest.approx(5.7, rel=0.02)
    assert cost.macs / 1e9 == pytest.approx(1.26, rel=0.05)  # attention's two products included


def test_fvcore_counts_the_same():
    nn = pytest.importorskip("fvcore.nn")
    model = timm.create_model("gspn_pico").eval()
    analysis = nn.FlopCountAnalysis(model, torch.zeros(1, 3, 28, 28))

    def count(inputs, outputs):
        from gspn.ops import flop_counts

        x, proxy, tap_proj, skip_proj = (inputs[i].type().sizes() for i in (0, 1, 2, 5))
        return flop_counts._composition_flops(x, proxy, tap_proj, skip_proj) // 2

    analysis.set_op_handle("gspn::propagate", count)
    counts = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    # It also counts norms and pooling, which the other counter leaves out.
    assert set(counts) == {"conv", "propagate", "linear", "layer_norm", "adaptive_avg_pool2d"}
    assert counts["conv"] + counts["propagate"] + counts["linear"] == count_cost(model).macs


def test_the_size_must_be_known():
    with pytest.raises(ValueError, match="GSPN2d has no input size"):
        count_cost(GSPN2d(4))
    with pytest.raises(ValueError, match=r"input_size=\(4, 4\)"):
        count_cost(GSPN2d(4), (4, 4))
