"""Which counters of operations see the scans: docs/other_libraries.md has the table."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gspn.analysis.cost import gspn2d_macs
from gspn.nn import GSPN2d


@pytest.fixture(scope="module")
def scan():
    """A layer, its input, and its multiply-adds: those of the proxy and of the operator."""
    layer, x = GSPN2d(16).eval(), torch.randn(1, 16, 20, 20)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return layer, x, counter.get_total_flops() // 2


def test_torch_sees_the_scans_of_a_layer(scan):
    layer, _, macs = scan
    assert macs == gspn2d_macs(layer, 20, 20)


def test_fvcore_names_the_scans_as_unsupported_and_takes_torchs_formula(scan):
    fvcore = pytest.importorskip("fvcore.nn", reason="needs gspn[dev]")
    layer, x, macs = scan

    def count(inputs, outputs):
        sizes = [one.type().sizes() if one.type().kind() == "TensorType" else None for one in inputs]
        return flop_registry[torch.ops.gspn.propagate](*sizes) // 2

    analysis = fvcore.FlopCountAnalysis(layer, x).unsupported_ops_warnings(False)
    assert analysis.total() == 16 * 8 * 20 * 20 and analysis.unsupported_ops()["gspn::propagate"] == 1
    analysis = fvcore.FlopCountAnalysis(layer, x).set_op_handle("gspn::propagate", count)
    assert analysis.total() == macs and "gspn::propagate" not in analysis.unsupported_ops()


def test_the_profiler_counts_the_proxy_alone(scan):
    layer, x, _ = scan
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        layer(x)
    counts = {event.key: event.flops for event in profile.key_averages()}
    assert counts["gspn::propagate"] == 0 and counts["aten::conv2d"] == 2 * 16 * 8 * 20 * 20
