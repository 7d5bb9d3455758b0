"""Token mixers on growing maps, and the attention that they are compared with."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from gspn._figures import save_figure
from gspn.bench import environment, size_sweep
from gspn.bench.attention import (
    LINEAR_ATTENTION,
    NO_ATTENTION,
    SELF_ATTENTION,
    MapAttention,
    attention_backend,
    head_count,
)
from gspn.bench.mixer import PER_CHANNEL, SHARED, MixerSweep
from gspn.bench.report import plot_sweep, write_csv
from gspn.bench.size_sweep import exponents, fitted_exponent
from gspn.bench.timing import Timing
from gspn.nn import GSPNMixer

CPU = torch.device("cpu")


def test_the_exponent_is_fitted():
    assert fitted_exponent([100, 400, 1600], [1.0, 4.0, 16.0]) == pytest.approx(1)
    assert fitted_exponent([4, 4], [1.0, 2.0]) is None
    assert fitted_exponent([4], [1.0]) is None


def test_the_backend_of_attention_is_named():
    q = torch.randn(1, 2, 300, 32)
    assert "flash" in attention_backend(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention_backend(lambda: (q @ q.mT).softmax(-1) @ q) == "math"
    with torch.inference_mode():
        assert attention_backend(lambda: (q @ q.mT).softmax(-1) @ q) == "math"
        assert "flash" in attention_backend(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention_backend(lambda: (q + 1).softmax(-1)) == NO_ATTENTION


def test_heads_have_64_channels_or_32_where_these_divide():
    assert [head_count(dim) for dim in (640, 96, 144, 16)] == [10, 3, 1, 1]


def test_attention_is_that_of_torch():
    attention = MapAttention(64).double()
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64)
    expected = nn.MultiheadAttention(64, 1, bias=False, batch_first=True).double()
    expected.in_proj_weight.data, expected.out_proj.weight.data = attention.qkv.weight, attention.out_proj.weight
    tokens = x.flatten(2).mT
    torch.testing.assert_close(attention(x).flatten(2).mT, expected(tokens, tokens, tokens)[0])


def test_linear_attention_weights_by_elu_plus_one():
    attention = MapAttention(8, linear=True).double()
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    q, k, v = attention.qkv(x.flatten(2).mT).chunk(3, -1)
    weights = (nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).mT
    expected = attention.out_proj(weights / weights.sum(-1, keepdim=True) @ v)
    torch.testing.assert_close(attention(x).flatten(2).mT, expected)


@pytest.mark.parametrize(
    ("mode", "dtype", "bare"),
    [("forward", torch.float32, True), ("train", torch.float32, False), ("train", torch.bfloat16, True),
     ("forward", torch.bfloat16, False)],
)  # fmt: skip
def test_every_mixer_passes_its_check(mode, dtype, bare):
    checked = MixerSweep(channels=32, dtype=dtype, mode=mode, bare=bare).check()
    assert tuple(checked) == MixerSweep.candidates
    for name, accuracies in checked.items():
        assert [one.name for one in accuracies] == (["y"] if mode == "forward" else ["y", "dx"])
        assert all(one.ok for one in accuracies), (name, accuracies)


def test_a_wrong_mixer_does_not(monkeypatch):
    forward = GSPNMixer.forward

    def wrong(self, x):
        return forward(self, x) * (1 if self.gspn.impl == "reference" else 1.001)

    monkeypatch.setattr(GSPNMixer, "forward", wrong)
    checked = MixerSweep(channels=32).check()
    assert [all(one.ok for one in accuracies) for accuracies in checked.values()] == [False, False, True, True]


def test_candidates_are_what_they_are_called():
    sweep = MixerSweep(channels=32)
    gspn, shared, softmax, linear = (sweep.module(name) for name in MixerSweep.candidates)
    assert (gspn.gspn.groups, gspn.gspn.proxy_dim) == (48, 8)
    assert (shared.gspn.groups, shared.gspn.proxy_dim) == (1, 2)
    assert softmax.attend is nn.functional.scaled_dot_product_attention and linear.attend is not softmax.attend
    bare = MixerSweep(channels=32, bare=True, proxy_dim=4)
    for name, groups in ((PER_CHANNEL, 32), (SHARED, 1)):
        module = bare.module(name)
        assert (module.gspn.groups, module.gspn.proxy_dim) == (groups, 4)
        assert [child for child, _ in module.named_children()] == ["in_proj", "gspn", "out_proj"]


def test_a_candidate_drops_out_before_it_takes_too_long(tmp_path, monkeypatch):
    # Attention takes a millisecond for 8 x 8 and grows with the square of the pixels, the other linearly.
    pace, power = {SHARED: 1 / 64, SELF_ATTENTION: 1 / 4096}, {SHARED: 2, SELF_ATTENTION: 4}
    sizes = []
    calls = MixerSweep.calls

    def noted(self, candidates, size):
        sizes.append(size)
        return calls(self, candidates, size)

    def timed(candidates, device, **options):
        return {c.name: Timing((pace[c.name] * sizes[-1] ** power[c.name],)) for c in candidates}

    monkeypatch.setattr(size_sweep, "time_interleaved", timed)
    monkeypatch.setattr(MixerSweep, "calls", noted)
    results = MixerSweep(channels=16).measure([16, 8, 64, 32], list(pace), slowest_ms=100)
    assert [(r.height, r.name, r.timing is None) for r in results] == [
        (8, SHARED, False),
        (8, SELF_ATTENTION, False),
        (16, SHARED, False),
        (16, SELF_ATTENTION, False),
        (32, SHARED, False),
        (32, SELF_ATTENTION, True),
        (64, SHARED, False),
    ]
    assert "256 ms" in results[5].skipped
    assert results[2].ratio == pytest.approx(16 / 4)
    assert exponents(results) == pytest.approx({SHARED: 1.0, SELF_ATTENTION: 2.0})
    path = tmp_path / "mixer.csv"
    write_csv(path, results, environment.describe(CPU))
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 7
    assert rows[0]["attention"] == "none"
    assert rows[1]["attention"] not in ("", "none")
    assert rows[5]["p50_ms"] == ""


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    results = MixerSweep(channels=16, mode="train").measure([4, 6], repeats=1, min_time=0.0)
    assert all(r.timing is not None and r.details["macs"] and r.details["params"] for r in results)
    assert {r.name for r in results} == {PER_CHANNEL, SHARED, SELF_ATTENTION, LINEAR_ATTENTION}
    save_figure(plot_sweep(results, exponents(results), "a", "b"), tmp_path / "mixer.png", dpi=50)
    assert (tmp_path / "mixer.png").exists()
